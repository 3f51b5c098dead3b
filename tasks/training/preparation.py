"""Everything that stays the same over a training: data, model with what is trained, optimizer, number of steps."""

import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.artifacts import AdaptedWeights
from schemas.config import TrainingConfig
from tasks.models import choose_device, choose_dtype
from tasks.partitions import count_rows
from tasks.training.adamw import EIGHT_BITS, build_adamw
from tasks.training.distributed import run_once_per_node
from tasks.training.engines.base_dropout import describe_dropout, find_dropout, switch_off_dropout
from tasks.training.engines.choice import choose_engine
from tasks.training.engines.engine import Engine
from tasks.training.frozen import load_base
from tasks.training.indexed_table import lay_out_index, open_indexed
from tasks.training.lora import collect_trained
from tasks.training.methods import attach_trained, count_trained
from tasks.training.movement import take_fingerprints
from tasks.training.objective import SFT, Objective
from tasks.training.optimizers import AdapterOptimizer, WholeOptimizer
from tasks.training.order import is_windowed
from tasks.training.preferences import choose_objective
from tasks.training.records import TrainingError
from tasks.training.rows import lay_out, open_rows
from tasks.training.schedule import count_steps
from tasks.training.sharding import is_sharded
from tasks.training.throughput import count_useful_flop
from tasks.training.token_table import TokenTable

# Evaluations of a run when the config does not say.
NUM_EVALS = 10


@dataclass(frozen=True)
class Setup:
    """A training before its first step."""

    config: TrainingConfig
    seed: int
    model: Any
    """The base with its adapter, or with weights of its own that are trained."""
    parameters: dict[str, nn.Parameter]
    """What is trained, by name."""
    num_trainable_parameters: int
    optimizer: AdapterOptimizer
    table: TokenTable
    eval_table: TokenTable | None
    """None without held-out examples."""
    rows: Sequence[Sequence[int]]
    """Indices of examples: packs when packing, else one a row."""
    steps_per_epoch: int
    num_steps: int
    eval_every_steps: int
    engine: Engine
    """How a step's rows go through the model."""
    notes: tuple[str, ...]
    """What a person should know about how it was set up."""
    device: torch.device
    dtype: torch.dtype
    adapted: tuple[AdaptedWeights, ...] = ()
    """Which of the base's weights an adapter stands beside, or are trained themselves, by kind."""
    start: Mapping[str, Tensor] = field(default_factory=dict)
    """Fingerprints of what is trained, before the first step; see `movement`."""
    objective: Objective = SFT
    flop_per_token: float = 0.0
    """Useful ones; see `throughput`."""


def prepare_training(
    base_model: Path,
    tokens: Path,
    folder: Path,
    config: TrainingConfig,
    *,
    seed: int,
    objective: Objective | None = None,
    tokens_address: str | None = None,
) -> Setup:
    """Lay the examples out, load the model with what is trained, and seed torch, numpy and Python.

    Args:
        base_model: folder of the base model.
        tokens: with train.parquet and eval.parquet.
        folder: where examples are laid out for all ranks of this machine; deleted again.
        config: the training section.
        seed: of the adapter's start, and of what comes after.
        objective: what a step optimizes; None: as the config says.
        tokens_address: of the tokens' folder in a store, where this one lacks parts of a large train.parquet.

    Raises:
        TrainingError: no examples, an example with nothing to learn, an unknown module, ids outside the vocabulary,
            early stopping without held-out examples, or an engine or kind of weights that cannot be had here.
    """
    table, rows, eval_table = _read_splits(tokens, folder, config, tokens_address)
    device = choose_device()
    dtype = choose_dtype(config.precision, device)
    adapted, adapted_weights, flop_per_token, told = _load_trained(
        base_model, config, (table, eval_table), seed=seed, dtype=dtype, device=device
    )
    parameters = collect_trained(adapted)
    start = take_fingerprints(adapted, parameters)
    steps_per_epoch, num_steps = count_steps(len(rows), config)
    longest = 0 if eval_table is None else int(eval_table.lengths.max())
    engine, notes = choose_engine(adapted, table, rows, config, device=device, dtype=dtype, longest=longest)
    if config.is_lora or not is_sharded(config):  # else they go to the device in parts
        for parameter in parameters.values():
            parameter.data = parameter.data.to(device)
    setup = Setup(
        config=config,
        seed=seed,
        model=adapted,
        parameters=parameters,
        num_trainable_parameters=sum(parameter.numel() for parameter in parameters.values()),
        optimizer=_build_optimizer(parameters, engine, config),
        table=table,
        eval_table=eval_table,
        rows=rows,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        eval_every_steps=config.eval_every_steps or math.ceil(num_steps / NUM_EVALS),
        engine=engine,
        notes=(*told, *notes),
        adapted=adapted_weights,
        start=start,
        device=device,
        dtype=dtype,
        objective=objective or choose_objective(config),
        flop_per_token=flop_per_token,
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return setup


def _load_trained(
    base_model: Path,
    config: TrainingConfig,
    tables: Sequence[TokenTable | None],
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Any, tuple[AdaptedWeights, ...], float, tuple[str, ...]]:
    """Return the model with what is trained, its weights by kind, useful FLOP a token, and what is told of its dropout.

    What is trained is drawn on the CPU: the same start whatever the device. A base that will be divided stays there,
    and the adapter with it while the model is tried out.
    """
    model = load_base(base_model, config, dtype=dtype, device=device)
    _check_vocabulary(model, *tables)
    found = find_dropout(model) if config.base_dropout else switch_off_dropout(model)
    weights = count_trained(model, config)
    adapted = attach_trained(model, config, seed=seed, dtype=dtype)
    flop_per_token = count_useful_flop(adapted)  # while the weights are still where the model has them
    if not is_sharded(config):
        adapted = adapted.to(device)
    told = (describe_dropout(found, is_kept=config.base_dropout),) if found else ()
    return adapted, weights, flop_per_token, told


def _build_optimizer(parameters: dict[str, nn.Parameter], engine: Engine, config: TrainingConfig) -> WholeOptimizer:
    """Return AdamW for what is trained, as the engine takes part in it and binds the gradients."""
    optimizer = build_adamw(list(parameters.values()), config)
    engine.attach_to(optimizer)
    return WholeOptimizer(
        parameters,
        optimizer,
        config.max_grad_norm,
        engine.bind_gradients(),
        waits=config.optimizer == EIGHT_BITS,
    )


def _read_splits(
    tokens: Path, folder: Path, config: TrainingConfig, address: str | None
) -> tuple[TokenTable, Sequence[Sequence[int]], TokenTable | None]:
    """Return the training examples, their rows, and the held-out examples or None, mapped from disk on every rank.

    Of a large table in parts only the index is laid out, and each part when it is needed.
    """
    path = tokens / "eval.parquet"
    num_eval = count_rows(path) if path.exists() else 0
    train, place = tokens / "train.parquet", folder.with_name(f"{folder.name}-parts")
    large = is_windowed(tokens)
    rows: Sequence[Sequence[int]]
    if not large and not count_rows(train):
        raise TrainingError(f"{train}: no training examples: check the dataset's rejects")
    setting = "early_stopping_patience" if config.early_stopping_patience is not None else "keep"
    if not num_eval and (config.keeps_best or config.early_stopping_patience is not None):
        raise TrainingError(
            f"training.{setting} is {getattr(config, setting)}, but {path} has no held-out examples to go by: set "
            f"data.eval_fraction or data.eval_source, or leave {setting} out"
        )

    def write() -> None:
        shutil.rmtree(place, ignore_errors=True)  # of an attempt that was killed
        if large:
            lay_out_index(train, folder / "train", config, address)
        else:
            lay_out(train, folder / "train", config)
        if num_eval:
            lay_out(path, folder / "eval", config.model_copy(update={"packing": False}))

    try:
        run_once_per_node(write)
        if large:
            table, rows = open_indexed(train, folder / "train", place, config, address)
        else:
            table, rows = open_rows(folder / "train", config)
        return table, rows, open_rows(folder / "eval", config)[0] if num_eval else None
    finally:
        run_once_per_node(lambda: shutil.rmtree(folder, ignore_errors=True))


def _check_vocabulary(model: PreTrainedModel, *tables: TokenTable | None) -> None:
    """Raise TrainingError when a token id has no row in the embedding."""
    embedding: Any = model.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    for table in tables:
        if table is None:
            continue
        highest, where = table.find_highest()
        if highest >= size:
            raise TrainingError(
                f"example {table.example_ids[where]} has token id {highest}, but the base model's embedding has {size} "
                "rows: the tokenizer does not belong to this model, or has added tokens: take rows with that token out"
            )
