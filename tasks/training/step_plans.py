"""Which rows each step takes, whose they are, and which parts of the table they want, ahead of their batches."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from schemas.config import TrainingConfig
from tasks.training.order import RowParts, deal_rows, draw_order
from tasks.training.token_table import Packs, TokenTable

STEPS_AHEAD = 64
"""Steps whose parts are prepared, of a table in parts that are read when needed."""
MOST_PARTS = 16
"""Parts that are prepared at a time: those of two windows. A step that needs more gets them."""


class StepPlan(NamedTuple):
    """A step's rows, before their tokens are read."""

    number: int
    own: list[Sequence[int]]
    """Rows that this rank forms."""
    others: list[Sequence[int]]
    """Rows that other ranks form."""
    parts: list[int]
    """Of the table: those that the own rows are in."""


def find_row_parts(rows: Sequence[Sequence[int]]) -> RowParts | None:
    """Return the parts that rows are of, where they are gone through in windows."""
    return rows.parts if isinstance(rows, Packs) else None


def plan_steps(
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    config: TrainingConfig,
    *,
    seed: int,
    first: int,
    last: int,
    turn: tuple[int, int],
) -> Iterator[StepPlan]:
    """Yield the rows of each step."""
    number, count = turn
    parts = find_row_parts(rows)
    rows_per_step = config.rows_per_step
    steps_per_epoch = -(-len(rows) // rows_per_step)
    order, order_epoch = None, -1
    for step in range(first, last):
        epoch, position = divmod(step, steps_per_epoch)
        if order is None or epoch != order_epoch:
            order, order_epoch = draw_order(len(rows), parts, seed=seed, epoch=epoch), epoch
        span = slice(position * rows_per_step, (position + 1) * rows_per_step)
        chosen = order.rows[span]
        window = [rows[row] for row in chosen]
        if parts is None:
            yield StepPlan(step, window, [], [])
        elif count == 1 or len(window) < count:  # of the last few rows of an epoch, every rank forms all
            yield StepPlan(step, window, [], list(dict.fromkeys(parts.find(chosen).tolist())))
        else:
            tokens = [int(table.lengths[list(row)].sum()) for row in window]
            shares = deal_rows(order.lanes[span], tokens, count)
            own = [window[place] for place in shares[number]]
            others = [window[place] for each, share in enumerate(shares) if each != number for place in share]
            yield StepPlan(step, own, others, list(dict.fromkeys(parts.find(chosen[shares[number]]).tolist())))


def prepare_parts(
    upcoming: "deque[StepPlan]", plans: Iterator[StepPlan], table: TokenTable, user: object
) -> "deque[StepPlan]":
    """Take up the steps that come next, and have their parts prepared, as many as may be held; give what was taken."""
    most_steps = 1 if table.parts is None else STEPS_AHEAD
    while len(upcoming) < most_steps and (plan := next(plans, None)) is not None:
        upcoming.append(plan)
    if upcoming and table.parts is not None:
        wanted = list(dict.fromkeys(part for plan in upcoming for part in plan.parts))
        table.parts.prepare(user, wanted[: max(MOST_PARTS, len(upcoming[0].parts))])
    return upcoming
