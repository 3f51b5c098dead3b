"""The micro batches of every optimizer step.

Which rows a step holds depends only on the seed, the epoch and the step, so that a resumed training goes on exactly
where it was. How they go through the model is another matter: padded side by side, or flat, all examples of a forward
pass end to end.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.config import TrainingConfig
from tasks.decoder.dropout import derive_key
from tasks.training.batches import Batch, form_batch, form_flat_batch
from tasks.training.step_plans import StepPlan, plan_steps, prepare_parts
from tasks.training.token_table import TokenTable

# Tokens of a padded batch that keep a device busy.
_LEAST_BUCKET_TOKENS = 2048


FormStep = Callable[[TokenTable, Sequence[Sequence[int]]], list[Batch]]


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
