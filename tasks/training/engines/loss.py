"""The loss of a batch in the plainest form: one forward pass, and logits at every position.

Dimensions: `B` rows, `S` tokens a row, `N` chosen positions, `V` vocabulary.

What is faster is compared with this before a training (`self_check`), and in the tests.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.batches import Batch, form_batch
from tasks.training.methods import find_base
from tasks.training.records import TrainingError
from tasks.training.token_table import TokenTable

# Positions of an example used to try out the short cuts: enough for attention to matter, cheap on any model.
TRIAL_TOKENS = 24


def compute_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return -log p(target) of the chosen positions [N] (nats, fp32); 0 where a target does not count.

    Args:
        model: causal LM, with or without an adapter.
        batch: on the model's device.
    """
    logits, targets = _compute_logits(model, batch)
    losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.index_select(0, find_chosen(batch))


def find_chosen(batch: Batch) -> Tensor:
    """Return the positions [N], into all of B * S, whose losses are computed."""
    return batch.trained if batch.trained is not None else (batch.targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]


def sum_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of -log p(target) over the trained positions (nats, fp32 scalar); 0 where there are none.

    Args:
        model: causal LM, with or without an adapter.
        batch: on the model's device.
    """
    logits, targets = _compute_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


@torch.no_grad()
def isolates_packed(model: nn.Module, table: TokenTable, device: torch.device) -> bool:
    """Try out whether a second example's logits stay the same when another one stands before it in its row.

    transformers finds packed examples by position_ids that start again, for attention that goes through its mask
    functions, without a cache and without an attention mask. Recurrent layers do not look at them.
    """
    pair = cut_trial(table, count=2)
    packed, _ = _compute_logits(model, form_batch(pair, [[0, 1]]).move(device))
    alone, _ = _compute_logits(model, form_batch(pair, [[1]]).move(device))
    return _is_close(packed[int(pair.offsets[1]) :], alone)


@torch.no_grad()
def check_causal(model: nn.Module, table: TokenTable, device: torch.device) -> None:
    """Try out whether the logits of a piece's first half stay the same when its second half is another one.

    Raises:
        TrainingError: those of most positions do not (rounding may send single tokens to other experts): the model
            would learn to copy what it should predict.
    """
    piece = cut_trial(table, count=1)
    half = len(piece.input_ids) // 2
    if not half:
        return
    found, _ = _compute_logits(model, form_batch(piece, [[0]]).move(device))
    first = int(piece.input_ids[0])
    input_ids = piece.input_ids.copy()
    input_ids[half:] = np.where(input_ids[half:] == first, first - 1 if first else 1, first)
    other, _ = _compute_logits(model, form_batch(replace(piece, input_ids=input_ids), [[0]]).move(device))
    limit = max(1e-3, 4 * torch.finfo(found.dtype).eps)
    before, after = found[:half].float(), other[:half].float()
    differs = (after - before).norm(dim=-1) > limit * before.norm(dim=-1)
    if 2 * int(differs.sum()) > half:
        kind = type(find_base(model)).__name__
        raise TrainingError(
            f"this {kind} sees the tokens after the one whose successor it predicts, as encoders do: choose a model "
            "that writes text token by token"
        )


def _compute_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits [B * S, V] and targets [B * S] of all positions."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    return model(**arguments).logits.flatten(0, 1), batch.targets.flatten()


def _is_close(left: Tensor, right: Tensor) -> bool:
    """Compare as another order of summation would differ: 1e-4 of the norm, a few roundings in 16 bits."""
    limit = max(1e-4, 4 * torch.finfo(left.dtype).eps)
    return bool(((left.float() - right.float()).norm() <= limit * right.float().norm()).item())


def cut_trial(table: TokenTable, *, count: int) -> TokenTable:
    """Make a table of `count` short pieces of the first examples; every second position is trained."""
    table = table.head or table
    last = len(table.example_ids) - 1
    spans = [(int(table.offsets[min(i, last)]), int(table.offsets[min(i, last) + 1])) for i in range(count)]
    pieces = [table.input_ids[begin : min(end, begin + TRIAL_TOKENS)] for begin, end in spans]
    offsets = np.cumsum([0, *(len(piece) for piece in pieces)]).astype(np.int64)
    input_ids = np.concatenate(pieces)
    targets = np.where(np.arange(len(input_ids)) % 2 == 0, input_ids, IGNORE_INDEX).astype(np.int32)
    return TokenTable([f"trial {i}" for i in range(count)], offsets, input_ids, targets)
