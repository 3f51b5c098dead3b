"""Each row comes once an epoch, in windows of a few parts, and ranks share the parts of a window."""

from pathlib import Path

import numpy as np
import pytest

from tasks.training import order
from tasks.training.order import LANES, RowParts, count_parts_per_window, deal_rows, draw_order

# Forty parts of 90 to 129 rows, one of them empty.
SIZES = [0 if number == 7 else 90 + number for number in range(40)]
PARTS = RowParts(np.cumsum([0, *SIZES]), 8)
NUM_ROWS = sum(SIZES)


def test_a_table_of_one_window_has_the_order_over_all_rows() -> None:
    """The literal one of every version so far: adapters and checkpoints hang on it."""
    drawn = draw_order(10, None, seed=3, epoch=1)
    assert drawn.rows.tolist() == [4, 1, 2, 8, 5, 0, 7, 9, 6, 3]
    assert not order.is_windowed(Path("nowhere"))


def test_every_row_comes_once_and_windows_have_parts_of_their_own() -> None:
    drawn = draw_order(NUM_ROWS, PARTS, seed=1, epoch=0)
    assert sorted(drawn.rows.tolist()) == list(range(NUM_ROWS))
    parts, start, seen = PARTS.find(drawn.rows), 0, set[int]()
    chosen = np.random.default_rng([1, 0]).permutation(40)
    for window in range(5):
        own = set(chosen[8 * window : 8 * window + 8].tolist()) - {7}
        stop = start + sum(SIZES[part] for part in own)
        assert set(parts[start:stop].tolist()) == own
        assert not own & seen
        assert drawn.lanes[start:stop].tolist()[:16] == [*range(LANES)] * 2
        start, seen = stop, seen | own
    assert start == NUM_ROWS
    others = [draw_order(NUM_ROWS, PARTS, seed=seed, epoch=epoch).rows for seed, epoch in ((1, 0), (2, 0), (1, 1))]
    assert np.array_equal(others[0], drawn.rows)
    assert not any(np.array_equal(other, drawn.rows) for other in others[1:])


def test_a_step_has_rows_of_all_parts_of_its_window_and_a_lane_of_few() -> None:
    drawn = draw_order(NUM_ROWS, PARTS, seed=1, epoch=0)
    parts = PARTS.find(drawn.rows)
    assert len(set(parts[:32].tolist())) >= 6
    first = slice(0, 32 * 20)  # of the first window
    for lane in range(LANES):
        assert len(set(parts[first][drawn.lanes[first] == lane].tolist())) <= 3


@pytest.mark.parametrize("num_shares", [1, 2, 3, 4, 8])
def test_ranks_get_as_much_and_the_same_lanes_in_every_step(num_shares: int) -> None:
    drawn, generator = draw_order(NUM_ROWS, PARTS, seed=1, epoch=0), np.random.default_rng(0)
    lanes: list[set[int]] = [set() for _ in range(num_shares)]
    for step in range(20):
        own = drawn.lanes[32 * step : 32 * step + 32]
        tokens = generator.integers(15_900, 16_385, 32)
        shares = deal_rows(own, tokens, num_shares)
        assert sorted(np.concatenate(shares).tolist()) == list(range(32))
        sums = [int(tokens[share].sum()) for share in shares]
        assert max(sums) < 1.3 * sum(sums) / num_shares
        for known, share in zip(lanes, shares, strict=True):
            known |= set(own[share].tolist())
    if LANES % num_shares == 0:
        assert [len(each) for each in lanes] == [LANES // num_shares] * num_shares
        assert set.union(*lanes) == set(range(LANES))
    else:
        assert max(map(len, lanes)) <= LANES // num_shares + 2


def test_every_share_has_a_row_however_long_one_is() -> None:
    for tokens in ([1, 1, 1, 1000], [1000, 1, 1, 1], [1, 1000, 1, 1]):
        assert [len(share) for share in deal_rows(np.zeros(4, np.int64), tokens, 4)] == [1] * 4
        assert sorted(np.concatenate(deal_rows(np.arange(4), tokens, 3)).tolist()) == [0, 1, 2, 3]


def test_windows_are_as_even_as_parts_allow() -> None:
    """10^6 rows in 20 parts: three windows of seven; 10^8 in 2,000: of eight."""
    assert count_parts_per_window(1_000_000, 20) == 7
    assert count_parts_per_window(100_000_000, 2000) == 8
    assert count_parts_per_window(450_000, 16) == 8
