"""The tensors of one forward pass, made of examples.

Dimensions: `B` rows of a micro batch, `S` tokens of its longest row, `N` trained positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.decoder.attention import Segments, send
from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.token_table import TokenTable

# Tokens of a flat batch: the matrix products like their sides round, and float8 ones want multiples of 16.
FLAT_MULTIPLE = 64


@dataclass(frozen=True)
class Batch:
    """One forward pass. Padding is on the right, where causal attention never sees it: no mask is needed."""

    input_ids: Tensor
    """[B, S] int64"""
    targets: Tensor
    """[B, S] int64; IGNORE_INDEX on padding and where nothing is learned."""
    position_ids: Tensor | None
    """[B, S] int64, from 0 again in each example of a pack; none when every row is one example."""
    example_ids: tuple[str, ...]
    num_tokens: int
    """Without padding."""
    num_trained_tokens: int
    """Targets that count."""
    segments: Segments | None = None
    """Of a flat batch, B = 1: where its examples lie."""
    trained: Tensor | None = None
    """[N] of a flat batch: the positions that are learned, and some that are not, up to a round number."""
    row_lengths: tuple[int, ...] = ()
    """Tokens of each row without its padding; nothing where there is none."""
    dropout_key: int = 0
    """Of the fused decoder's dropout, from seed, step and number in the step."""
    weights: Tensor | None = None
    """[B, S] fp32, of the targets; none where each weighs 1. Stays on the host."""
    total_weight: float = 0.0
    """Of the trained tokens, where there are weights."""
    indices: tuple[int, ...] = ()
    """Numbers of the examples in their table."""
    is_elsewhere: bool = False
    """Of other ranks, all that they compute of a step: only counts, and no tokens that this rank would have to read."""
    owners: Tensor | None = None
    """[B, S] int64, of pairs: which of the batch's examples a position is of, on padding of any. Stays on the host."""
    reference: Tensor | None = None
    """[examples] fp32, of pairs: see `TokenTable.reference`. Stays on the host."""

    @property
    def num_squares(self) -> int:
        """Sum of the squares of its segments' lengths, or of its rows': what attention goes by."""
        if self.segments is not None:
            return sum(length * length for length in self.segments.lengths)
        num_rows, longest = self.input_ids.shape
        return int(num_rows * longest * longest)

    @property
    def num_head_rows(self) -> int:
        """Positions whose logits are computed, where the head runs on the trained ones alone."""
        return self.num_trained_tokens if self.trained is None else len(self.trained)

    def choose(self, values: Tensor) -> Tensor:
        """Return the values [N] of [B, S], on the host, at the positions whose log-probabilities an engine gives."""
        if self.trained is not None:
            return values[0].index_select(0, self.trained)
        return values[self.targets != IGNORE_INDEX]

    def move(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        segments, trained = self.segments, self.trained
        return replace(
            self,
            input_ids=send(self.input_ids, device),
            targets=send(self.targets, device),
            position_ids=None if self.position_ids is None else send(self.position_ids, device),
            segments=None if segments is None else segments.move(device),
            trained=None if trained is None else send(trained, device),
        )


def form_flat_batch(table: TokenTable, indices: Sequence[int]) -> Batch:
    """Lay examples end to end; up to 63 tokens of padding, a segment of their own, make the number a round one."""
    spans = [slice(int(table.offsets[index]), int(table.offsets[index + 1])) for index in indices]
    lengths = [span.stop - span.start for span in spans]
    num_tokens = sum(lengths)
    num_padding = -num_tokens % FLAT_MULTIPLE
    if num_padding:
        lengths.append(num_padding)
    input_ids = np.zeros(num_tokens + num_padding, np.int64)
    targets = np.full(num_tokens + num_padding, IGNORE_INDEX, np.int64)
    np.concatenate([table.input_ids[span] for span in spans], out=input_ids[:num_tokens], casting="same_kind")
    np.concatenate([table.targets[span] for span in spans], out=targets[:num_tokens], casting="same_kind")
    trained = np.flatnonzero(targets != IGNORE_INDEX)
    num_trained_tokens = len(trained)
    # A round number of rows for the head as well, and at least one: the rest are positions that do not count.
    num_others = -num_trained_tokens % FLAT_MULTIPLE if num_trained_tokens else FLAT_MULTIPLE
    others = np.flatnonzero(targets == IGNORE_INDEX)[:num_others]
    borders = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    weights = None
    if table.weights is not None:
        weights = np.zeros((1, num_tokens + num_padding), np.float32)
        np.concatenate([table.weights[span] for span in spans], out=weights[0, :num_tokens], casting="same_kind")
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        targets=torch.from_numpy(targets)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        example_ids=tuple(table.example_ids[index] for index in indices),
        row_lengths=(num_tokens,),
        num_tokens=num_tokens,
        num_trained_tokens=num_trained_tokens,
        segments=Segments(torch.from_numpy(borders.astype(np.int32)), tuple(lengths)),
        trained=torch.from_numpy(np.concatenate([trained, others])),
        indices=tuple(indices),
        **_describe_weights(weights, targets[None]),
        **_describe_pairs(table, indices, [lengths]),
    )


def _describe_pairs(table: TokenTable, indices: Sequence[int], lengths: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return what a batch says of its pairs: examples in order, and where they lie.

    Args:
        table: of the examples.
        indices: of them, row by row.
        lengths: of the examples of each row, and of what follows them up to its end.
    """
    if table.group == 1:
        return {}
    last = len(indices) - 1
    owners, number = [], 0
    for row in lengths:
        owners.append(np.repeat(np.minimum(np.arange(number, number + len(row)), last), row))
        number += len(row)
    reference = None if table.reference is None else torch.from_numpy(table.reference[list(indices)])
    return {"owners": torch.from_numpy(np.stack(owners)), "reference": reference}


def _describe_weights(weights: NDArray[np.float32] | None, targets: NDArray[np.int64]) -> dict[str, Any]:
    """Return what a batch says of its targets' weights, those that do not count left out."""
    if weights is None:
        return {}
    weights *= targets != IGNORE_INDEX
    return {"weights": torch.from_numpy(weights), "total_weight": float(weights.sum(dtype=np.float64))}


def form_batch(table: TokenTable, rows: Sequence[Sequence[int]]) -> Batch:
    """Lay rows of examples into tensors, each row padded on the right to the longest."""
    is_packed = any(len(row) > 1 for row in rows)
    length = max(sum(int(table.offsets[i + 1] - table.offsets[i]) for i in row) for row in rows)
    input_ids = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), IGNORE_INDEX, np.int64)
    # The padding keeps counting from 0 as a segment of its own, so that it joins no example.
    weights = None if table.weights is None else np.zeros((len(rows), length), np.float32)
    position_ids = np.tile(np.arange(length), (len(rows), 1)) if is_packed else None
    row_lengths = []
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            begin, end = table.offsets[index], table.offsets[index + 1]
            stop = start + int(end - begin)
            input_ids[number, start:stop] = table.input_ids[begin:end]
            targets[number, start:stop] = table.targets[begin:end]
            if weights is not None and table.weights is not None:
                weights[number, start:stop] = table.weights[begin:end]
            if position_ids is not None:
                position_ids[number, start:stop] = np.arange(stop - start)
            start = stop
        if position_ids is not None:
            position_ids[number, start:] = np.arange(length - start)
        row_lengths.append(start)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        position_ids=None if position_ids is None else torch.from_numpy(position_ids),
        example_ids=tuple(table.example_ids[index] for row in rows for index in row),
        num_tokens=sum(row_lengths),
        num_trained_tokens=int((targets != IGNORE_INDEX).sum()),
        row_lengths=tuple(row_lengths),
        indices=tuple(index for row in rows for index in row),
        **_describe_weights(weights, targets),
        **({} if table.group == 1 else _own_rows(table, rows, length)),
    )


def _own_rows(table: TokenTable, rows: Sequence[Sequence[int]], length: int) -> dict[str, Any]:
    """Return what a padded batch of one example a row says of its pairs."""
    assert all(len(row) == 1 for row in rows)
    return _describe_pairs(table, [row[0] for row in rows], [[length]] * len(rows))
