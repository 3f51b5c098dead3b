"""The rows that are trained on, and the micro batches of every optimizer step.

Dimensions: `B` rows of a micro batch, `S` tokens of its longest row, `T` tokens of an example, `N` examples.

A row is one example, or a pack of several. Which rows a step holds depends only on the seed, the epoch and the step, so
that a resumed training goes on exactly where it was. How they go through the model is another matter: padded side by
side, or flat, all examples of a forward pass end to end.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.config import TrainingConfig
from tasks.decoder.attention import Segments, send
from tasks.decoder.dropout import derive_key
from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.records import TrainingError
from tasks.training.step_plans import StepPlan, plan_steps, prepare_parts
from tasks.training.token_table import TokenTable, open_packs, open_table, write_examples, write_packs

MAX_PACK_TOKENS = 16384
MIN_PACK_TOKENS = 2048
MIN_STEPS_PER_EPOCH = 50
# Tokens of a flat batch: the matrix products like their sides round, and float8 ones want multiples of 16.
FLAT_MULTIPLE = 64
# Tokens of a padded batch that keep a device busy.
_LEAST_BUCKET_TOKENS = 2048


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


FormStep = Callable[[TokenTable, Sequence[Sequence[int]]], list[Batch]]


def lay_out(split: Path, folder: Path, config: TrainingConfig) -> None:
    """Write the examples of a split of a tokens folder as they are trained on, and what stands in each row.

    Args:
        split: train.parquet or eval.parquet.
        folder: for `open_rows`; made when missing.
        config: whether a row is a pack, and of how many tokens.

    Raises:
        TrainingError: an example has nothing to learn, is longer than a pack, or has not as many labels as input_ids.
    """
    try:
        write_examples(split, folder, pairs=config.is_paired)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    table = open_table(folder, group=count_group(config))
    tokens_per_pack = choose_pack_tokens(table.group_lengths, config) if config.packing else None
    longest = int(table.group_lengths.max(initial=0))
    if tokens_per_pack is not None and longest > tokens_per_pack:
        what = "the two answers of example" if config.is_paired else "example"
        name = table.example_ids[int(table.group_lengths.argmax()) * table.group]
        raise TrainingError(
            f"training.tokens_per_pack is {tokens_per_pack}, but {what} {name} {'have' if config.is_paired else 'has'} "
            f"{longest} tokens: raise tokens_per_pack, or lower tokenization.max_length"
        )
    write_packs(folder, tokens_per_pack, group=table.group)


def open_rows(folder: Path, config: TrainingConfig | None = None) -> tuple[TokenTable, Sequence[Sequence[int]]]:
    """Map what `lay_out` wrote: the examples, and the rows, each the numbers of its examples."""
    return open_table(folder, group=1 if config is None else count_group(config)), open_packs(folder)


def count_group(config: TrainingConfig) -> int:
    """Return how many examples go through the model together."""
    return 2 if config.is_paired else 1


def choose_pack_tokens(lengths: NDArray[Any], config: TrainingConfig) -> int:
    """Return the budget of a pack in tokens.

    Where the config leaves it open: 16,384, halved while an epoch would have fewer than 50 steps, but never below 2,048
    or the longest example. It depends on the data alone, so that the same config trains the same on every machine.
    """
    if config.tokens_per_pack != "auto":
        return config.tokens_per_pack
    longest, total = int(lengths.max(initial=1)), int(lengths.sum())
    budget = MAX_PACK_TOKENS
    while budget > MIN_PACK_TOKENS and total < MIN_STEPS_PER_EPOCH * config.rows_per_step * budget:
        budget //= 2
    return max(budget, longest)


def iterate_steps(
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    config: TrainingConfig,
    *,
    seed: int,
    first: int,
    last: int,
    form_step: FormStep | None = None,
    turn: tuple[int, int] = (0, 1),
) -> Iterator[list[Batch]]:
    """Yield the micro batches of each optimizer step from `first` up to but not including `last`.

    Each epoch is a new order of the rows, drawn from (seed, epoch): see `order`. Of a table that is gone through in
    windows this rank forms its own batches only, and one that counts what the others compute; and it prepares the parts
    of the steps that come next.

    Args:
        table: the examples.
        rows: from `open_rows`.
        config: rows a step.
        seed: of the order.
        first: step.
        last: step.
        form_step: makes a step's batches of its rows; None: `form_padded_step` with the config's micro batch.
        turn: this rank's number among those that batches are dealt to, and how many there are.
    """
    number, count = turn
    user = object()
    upcoming: deque[StepPlan] = deque()
    plans = plan_steps(table, rows, config, seed=seed, first=first, last=last, turn=turn)
    try:
        while prepare_parts(upcoming, plans, table, user):
            plan = upcoming.popleft()
            form = form_step or partial(form_padded_step, micro_batch=config.micro_batch)
            batches = form(table, plan.own)
            places = range(number, count * len(batches), count) if plan.others else range(len(batches))
            batches = [
                replace(batch, dropout_key=derive_key(seed, plan.number, place))
                for place, batch in zip(places, batches, strict=True)
            ]
            yield [*batches, count_elsewhere(table, plan.others)] if plan.others else batches
    finally:
        if table.parts is not None:
            table.parts.prepare(user, [])


def count_elsewhere(table: TokenTable, rows: Sequence[Sequence[int]]) -> Batch:
    """Return what a step's sums want to know of rows that other ranks form."""
    examples = np.concatenate([np.asarray(row) for row in rows])
    num_tokens = int(table.lengths[examples].sum())
    weighs = table.weights is not None
    return Batch(
        input_ids=torch.empty((1, num_tokens), dtype=torch.int64, device="meta"),
        targets=torch.empty((1, num_tokens), dtype=torch.int64, device="meta"),
        position_ids=None,
        example_ids=("an example of another rank",) * len(examples),
        num_tokens=num_tokens,
        num_trained_tokens=int(table.trained[examples].sum()),
        weights=torch.empty(0) if weighs else None,
        total_weight=float(table.total_weights[examples].sum()) if weighs else 0.0,
        indices=tuple(examples.tolist()),
        is_elsewhere=True,
    )


def form_padded_step(
    table: TokenTable, rows: Sequence[Sequence[int]], micro_batch: int, tokens_per_forward: int | None = None
) -> list[Batch]:
    """Cut a step's rows into micro batches, the longest rows first: less padding, and the same sum of gradients.

    Args:
        table: the examples.
        rows: of the step.
        micro_batch: most rows of a batch.
        tokens_per_forward: most tokens of a batch of more than one row, padding included; None: any number.
    """
    lengths = np.array([table.lengths[list(row)].sum() for row in rows])
    parts = cut_padded_step(lengths, micro_batch, tokens_per_forward)
    return [form_batch(table, [rows[number] for number in part]) for part in parts]


def cut_padded_step(
    lengths: NDArray[Any], micro_batch: int, tokens_per_forward: int | None = None
) -> list[NDArray[Any]]:
    """Return the rows of each micro batch of a step, by their numbers; see `form_padded_step`.

    Args:
        lengths: tokens of each row.
        micro_batch: most rows of a batch.
        tokens_per_forward: most tokens of a batch of more than one row, padding included; None: any number.
    """
    order = np.argsort(-lengths, kind="stable")
    parts, start = [], 0
    while start < len(order):
        longest = int(lengths[order[start]])
        most = micro_batch if tokens_per_forward is None else min(micro_batch, max(1, tokens_per_forward // longest))
        stop = min(start + most, len(order))
        # Rows of less than half the length get a batch of their own, once there is enough to compute in this one.
        short = np.flatnonzero(2 * lengths[order[start:stop]] < longest)
        if len(short) and short[0] * longest >= _LEAST_BUCKET_TOKENS:
            stop = start + int(short[0])
        parts.append(order[start:stop])
        start = stop
    return parts


def form_flat_step(
    table: TokenTable, rows: Sequence[Sequence[int]], tokens_per_forward: int, *, num_parts: int = 1
) -> list[Batch]:
    """Divide a step's rows among flat batches of at most `tokens_per_forward` tokens, evenly.

    Each row, the longest first, joins the batch that is shortest so far (Graham, 1969).

    Args:
        table: the examples.
        rows: of the step; where one is above the budget, their examples are divided instead, pairs as wholes.
        tokens_per_forward: budget; an example above it gets a batch of its own.
        num_parts: the number of batches is a multiple of this, where there are as many rows or examples.
    """
    return [
        form_flat_batch(table, part) for part in cut_flat_step(table, rows, tokens_per_forward, num_parts=num_parts)
    ]


def cut_flat_step(
    table: TokenTable, rows: Sequence[Sequence[int]], tokens_per_forward: int, *, num_parts: int = 1
) -> list[list[int]]:
    """Return the examples of each flat batch of a step; see `form_flat_step`."""
    lengths = [int(table.lengths[list(row)].sum()) for row in rows]
    if max(lengths) > tokens_per_forward or len(rows) < num_parts:
        rows = divide_rows(table, rows)
        lengths = [int(table.lengths[row].sum()) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: -lengths[number])
    budget = max(tokens_per_forward, lengths[order[0]])
    count = -(-sum(lengths) // budget)
    while True:
        count = min(-(-count // num_parts) * num_parts, len(rows))
        parts: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, part) for part in range(count)]
        for number in order:
            filled, part = heappop(heap)
            parts[part].extend(rows[number])
            heappush(heap, (filled + lengths[number], part))
        if max(heap)[0] <= budget or count == len(rows):
            return parts
        count += 1


def divide_rows(table: TokenTable, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return rows of one example each, of one pair where the table holds pairs."""
    return [list(row[start : start + table.group]) for row in rows for start in range(0, len(row), table.group)]


def form_padded_pairs(
    table: TokenTable, rows: Sequence[Sequence[int]], micro_batch: int, tokens_per_forward: int
) -> list[Batch]:
    """Cut a step's pairs into micro batches of one example a row, the longest first; both of a pair are in one.

    Args:
        table: of pairs.
        rows: of the step.
        micro_batch: most rows of a batch, but for one pair.
        tokens_per_forward: most tokens of a batch of more than one pair, padding included.
    """
    pairs = sorted(divide_rows(table, rows), key=lambda pair: -int(table.lengths[pair].max()))
    batches, start = [], 0
    while start < len(pairs):
        longest = int(table.lengths[pairs[start]].max())
        count = max(1, min(micro_batch // table.group, tokens_per_forward // (table.group * longest)))
        batches.append(form_batch(table, [[index] for pair in pairs[start : start + count] for index in pair]))
        start += count
    return batches


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
