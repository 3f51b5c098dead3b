"""Direct preference optimization as an objective, and the log-probabilities of the model that a training begins with.

These are computed once, before the first step, by the engine that trains: an adapter begins as nothing, so that the
model with it is still the one without. They are kept beside the checkpoints, for a run that goes on.

Dimensions: `N` chosen positions of a micro batch, `E` its examples (chosen and rejected answers in turn), `P` pairs,
`K` figures.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from schemas.config import DpoConfig, TrainingConfig
from tasks.preferences import compute_pair_losses
from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.batches import Batch
from tasks.training.checkpoints import CheckpointError
from tasks.training.distributed import gather, keep_pace, run_on_rank0, share_examples
from tasks.training.engines.engine import Engine
from tasks.training.objective import SFT, Objective
from tasks.training.place import DamageError, Place
from tasks.training.sharding import is_sharded
from tasks.training.token_table import TokenTable

logger = logging.getLogger(__name__)

FIGURES = ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")
"""Means over pairs: part with a positive margin, the margin, and what it is the difference of."""
_FOLDER, _FILE = "reference", "reference.safetensors"

Reference = dict[str, NDArray[np.float32]]
"""Of each split, the log-probability of each example's answer; for ipo, of a token of it."""


def choose_objective(config: TrainingConfig) -> Objective:
    """Return what a config optimizes."""
    return make_dpo(config.dpo) if config.is_paired else SFT


def make_dpo(config: DpoConfig) -> Objective:
    """Return direct preference optimization; a step's loss is the mean over its pairs."""

    def find_ratios(log_probs: Tensor, batch: Batch) -> Tensor:
        assert batch.reference is not None, "no log-probabilities of the model that the training began with"
        found = sum_answers(log_probs, batch, is_mean=config.loss == "ipo")
        return (found - batch.reference.to(found.device, non_blocking=True)).view(-1, 2)

    def list_losses(log_probs: Tensor, batch: Batch) -> Tensor:
        ratios = find_ratios(log_probs, batch)
        return compute_pair_losses(ratios[:, 0] - ratios[:, 1], config)

    def sum_figures(log_probs: Tensor, batch: Batch) -> Tensor:
        rewards = config.beta * find_ratios(log_probs, batch)
        margins = rewards[:, 0] - rewards[:, 1]
        return torch.stack([(margins > 0).sum(), margins.sum(), *rewards.sum(dim=0)])

    return Objective(
        f"direct preference optimization ({config.loss})",
        lambda log_probs, batch: list_losses(log_probs, batch).sum(),
        count=lambda batch: len(batch.example_ids) / 2,
        figures=FIGURES,
        sum_figures=sum_figures,
        list_losses=list_losses,
    )


def sum_answers(log_probs: Tensor, batch: Batch, *, is_mean: bool) -> Tensor:
    """Return the log-probability [E] of each example's answer, or its mean over the answer's tokens.

    Args:
        log_probs: [N]; 0 where there is no target.
        batch: of which they are, on the host.
        is_mean: divide by the tokens.
    """
    assert batch.owners is not None
    numbers = torch.arange(len(batch.example_ids), device=log_probs.device)
    owners = batch.choose(batch.owners).to(log_probs.device, non_blocking=True)
    # Not by index_add_, whose order of summation a GPU does not keep.
    sums = torch.where(owners[None] == numbers[:, None], log_probs[None], 0.0).sum(dim=1)
    if not is_mean:
        return sums
    counts = torch.bincount(batch.owners[batch.targets != IGNORE_INDEX], minlength=len(numbers))
    return sums / counts.to(sums.device, non_blocking=True)


def find_reference(
    folder: Path,
    identity: str,
    tables: dict[str, TokenTable],
    model: nn.Module,
    engine: Engine,
    config: TrainingConfig,
    *,
    has_begun: bool,
    place: Place | None = None,
) -> dict[str, TokenTable]:
    """Return the tables with the log-probabilities of the model that the training begins with.

    Args:
        folder: of the run; keeps them.
        identity: of the run.
        tables: by split.
        model: with an adapter, or as it begins.
        engine: that computes with it.
        config: the training section.
        has_begun: whether there is a checkpoint, so that the model is another one by now.
        place: that machines share: another one may go on with the training.

    Raises:
        CheckpointError: weights of the model itself are trained, the training has begun, and they are gone.
    """
    kept = run_on_rank0(lambda: _find(folder / _FOLDER, identity, tables, place))
    if kept is None and has_begun and not (config.is_lora and not config.use_dora and not config.modules_to_save):
        raise CheckpointError(
            f"{folder / _FOLDER / _FILE}: the log-probabilities of the model that this training began with are gone or "
            f"damaged: delete {folder / 'checkpoints'}, and the run begins anew"
        )
    if kept is None:
        is_mean = config.dpo.loss == "ipo"
        with _switched_off(model):
            made = {
                split: compute_reference(table, model, engine, is_mean=is_mean, is_even=is_sharded(config))
                for split, table in tables.items()
            }
        run_on_rank0(lambda: _keep(folder / _FOLDER, identity, made, place))
        kept = made
    return {split: replace(table, reference=kept[split]) for split, table in tables.items()}


@contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    """Have the LoRA matrices add nothing for a while: they do not before the first step."""
    matrices = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    with torch.no_grad():
        saved = [matrix.clone() for matrix in matrices]
        for matrix in matrices:
            matrix.zero_()
        try:
            yield
        finally:
            for matrix, values in zip(matrices, saved, strict=True):
                matrix.copy_(values)


@torch.no_grad()
def compute_reference(
    table: TokenTable, model: nn.Module, engine: Engine, *, is_mean: bool, is_even: bool = False
) -> NDArray[np.float32]:
    """Return the log-probability of each example's answer; with several ranks, each computes its share.

    Args:
        table: the examples.
        model: that the engine computes with.
        engine: of the training.
        is_mean: a mean over the answer's tokens is wanted.
        is_even: every rank does as many passes; see `distributed.keep_pace`.
    """
    values = np.full(len(table.example_ids), np.nan, np.float32)
    was_training = model.training
    model.eval()
    for part, indices, counts in share_examples(table):
        for batch, is_new in keep_pace(engine.form_evaluation(part), is_even=is_even):
            found = sum_answers(engine.compute_log_probs(batch), batch, is_mean=is_mean)
            if counts and is_new:
                values[indices[list(batch.indices)]] = found.float().cpu().numpy()
    model.train(was_training)
    for share in gather(values):
        values = np.where(np.isnan(values), share, values)
    return values


def _find(folder: Path, identity: str, tables: dict[str, TokenTable], place: Place | None) -> Reference | None:
    """Return what an earlier attempt of the same run has kept, here or in the place; None where it has not."""
    found = _read(folder / _FILE, identity, tables)
    if found is not None or place is None or place.list_files(_FOLDER) is None:
        return found
    try:
        place.fetch_folder(_FOLDER, folder)
    except DamageError as error:
        logger.warning("%s", error)
        return None
    return _read(folder / _FILE, identity, tables)


def _keep(folder: Path, identity: str, reference: Reference, place: Place | None) -> None:
    """Keep them here, and in the place."""
    _write(folder / _FILE, identity, reference)
    if place is not None:
        place.put_folder(folder, _FOLDER)


def _read(path: Path, identity: str, tables: dict[str, TokenTable]) -> Reference | None:
    """Return what an earlier attempt of the same run has kept; None where it has not, or not whole."""
    try:
        with safe_open(path, "numpy") as file:
            if file.metadata()["identity"] != identity:
                return None
            found = {split: file.get_tensor(split) for split in tables}
    except Exception:  # absent or damaged: the library raises what it likes
        return None
    is_whole = all(found[split].shape == (len(table.example_ids),) for split, table in tables.items())
    return found if is_whole else None


def _write(path: Path, identity: str, reference: Reference) -> None:
    """Write them whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(reference, partial, {"identity": identity})
    partial.rename(path)
