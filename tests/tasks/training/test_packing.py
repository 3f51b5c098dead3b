import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.training.packing import pack, packing_efficiency


def test_each_example_goes_where_the_least_room_is_left() -> None:
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_no_examples_make_no_packs() -> None:
    assert pack([], 8) == []
    assert math.isnan(packing_efficiency([], [], 8))


@pytest.mark.parametrize("length", [0, 9])
def test_an_example_that_no_pack_holds_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens, and a pack holds 1 to 8"):
        pack([3, length], 8)


@given(lengths=st.lists(st.integers(1, 50), max_size=200), budget=st.integers(50, 120))
def test_every_example_is_packed_once_and_no_pack_overflows(lengths: list[int], budget: int) -> None:
    packs = pack(lengths, budget)
    assert sorted(index for one in packs for index in one) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in one) <= budget for one in packs)
    assert all(packs)
    # Any two packs together hold more than one budget, or they would have been one.
    fills = sorted(sum(lengths[index] for index in one) for one in packs)
    assert len(fills) < 2 or fills[0] + fills[1] > budget


def test_packs_are_as_full_as_their_examples_allow() -> None:
    lengths = [1 + (7919 * number) % 400 for number in range(5000)]
    assert packing_efficiency(lengths, pack(lengths, 2048), 2048) > 0.99
