import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.ingestion.rows.identity import UsableRow, make_conversation
from tasks.ingestion.splitting import splits
from tasks.ingestion.splitting.splits import (
    DUPLICATE,
    EVAL,
    LEAKED,
    TRAIN,
    UNUSED,
    Sides,
    choose,
    count_held_out,
    count_shared_prompts,
    find_first,
    hold_out,
    initial_sides,
    remove_leaks,
    split_dataset,
)
from tests.tasks.ingestion.conftest import write_index


def make(*texts: str, line: int = 1) -> UsableRow:
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return make_conversation(messages, None, "rows.json", line)


def make_many(num_rows: int) -> list[UsableRow]:
    return [make(f"question {number}", f"answer {number}", line=number) for number in range(1, num_rows + 1)]


def split(*datasets: Sequence[UsableRow], num_rows: int, seed: int = 0, rows_per_piece: int = 1000) -> Sides:
    """Hold out so many rows of each dataset, and tell where each row goes."""
    with tempfile.TemporaryDirectory() as folder:
        index = write_index(Path(folder), *datasets, rows_per_piece=rows_per_piece)
        sides = initial_sides(index)
        for number in range(len(datasets)):
            split_dataset(index, sides, number, num_rows, seed)
        remove_leaks(index, sides)
    return sides


def split_apart(train: Sequence[UsableRow], held_out: Sequence[UsableRow], max_rows: int) -> Sides:
    """Tell where the rows of a dataset and of a separate held-out one go."""
    with tempfile.TemporaryDirectory() as folder:
        index = write_index(Path(folder), train, held_out)
        sides = initial_sides(index)
        hold_out(index, sides, 1, max_rows, seed=0)
        remove_leaks(index, sides)
    return sides


def test_ids_are_compared_whole() -> None:
    ids = np.array([[1, 1], [1, 2], [2, 1], [1, 2], [1, 1]], dtype=np.uint64)
    assert find_first(ids).tolist() == [True, True, True, False, False]


def name_ids(rows: Sequence[UsableRow], sides: Sides, *group: int) -> set[str]:
    return {row.example_id for row, side in zip(rows, sides, strict=True) if side in (group or (EVAL,))}


def test_the_first_of_equal_rows_stays(tmp_path: Path) -> None:
    index = write_index(tmp_path, [make("a", "b", line=1), make("c", "d", line=2), make("a", "b", line=3)])
    assert initial_sides(index).tolist() == [TRAIN, TRAIN, DUPLICATE]


def test_number_of_held_out_rows() -> None:
    assert count_held_out(100, 0.1, 1000) == 10
    assert count_held_out(100, 0.1, 7) == 7
    assert count_held_out(5, 0.1, 1000) == 1
    assert count_held_out(3, 0.99, 1000) == 2
    assert count_held_out(1, 0.5, 1000) == 0
    assert count_held_out(100, 0.0, 1000) == 0
    assert count_held_out(0, 0.5, 1000) == 0


def test_split_depends_on_seed_and_contents_and_not_on_order_or_copies() -> None:
    rows = make_many(200)
    first = split(rows, num_rows=20, seed=1)
    assert np.bincount(first).tolist() == [180, 20]
    held_out = name_ids(rows, first)
    assert name_ids(rows[::-1], split(rows[::-1], num_rows=20, seed=1)) == held_out
    assert name_ids(rows * 3, split(rows * 3, num_rows=20, seed=1)) == held_out
    assert name_ids(rows, split(rows, num_rows=20, seed=2)) != held_out


def test_a_row_more_moves_at_most_one_row_across_the_border() -> None:
    rows = make_many(201)
    before = name_ids(rows[:200], split(rows[:200], num_rows=20))
    after = name_ids(rows, split(rows, num_rows=20))
    assert len(after) == 20
    assert len(before - after) <= 1


@pytest.mark.parametrize("number", [0, 1, 2, 117, 299, 300, 301])
def test_a_choice_is_of_as_many_as_are_wanted_and_a_larger_one_holds_it(tmp_path: Path, number: int) -> None:
    index = write_index(tmp_path, make_many(300), rows_per_piece=70)
    rows = np.ones(300, dtype=np.bool_)
    chosen = choose(index, rows, number, seed=0)
    assert int(chosen.sum()) == min(number, 300)
    assert choose(index, rows, number + 10, seed=0)[chosen].all()
    without = choose(index, ~chosen, number, seed=0)
    assert not (without & chosen).any()


def test_training_row_that_is_a_held_out_one_but_for_case_and_spaces_is_a_leak(tmp_path: Path) -> None:
    train = [make("What is it?", "A cat"), make("what  is it? ", "a CAT"), make("What is it?", "A dog")]
    held_out = [make("What is it?", "A cat")]
    sides = split_apart(train, held_out, 1000)
    assert sides.tolist() == [LEAKED, LEAKED, TRAIN, EVAL]
    assert count_shared_prompts(write_index(tmp_path, train, held_out), sides == TRAIN, sides == EVAL) == 1


def test_shared_prompts_are_counted_over_all_pieces(tmp_path: Path) -> None:
    rows = [make("q", "a"), make("r", "b"), make("q", "held out"), make("s", "held out")]
    index = write_index(tmp_path, rows, rows_per_piece=1)
    train, held_out = np.array([True, True, False, False]), np.array([False, False, True, True])
    assert count_shared_prompts(index, train, held_out) == 1


def test_training_row_that_begins_with_a_held_out_conversation_is_a_leak() -> None:
    def side(train: UsableRow, held_out: UsableRow) -> int:
        return int(split_apart([train], [held_out], 1000)[0])

    assert side(make("a", "b", "c", "d"), make("a", "b")) == LEAKED
    assert side(make("a", "b", "c", "d", "e", "f"), make("a", "b", "c", "d")) == LEAKED
    assert side(make("a", "b"), make("a", "b", "c", "d")) == TRAIN
    assert side(make("c", "d", "a", "b"), make("a", "b")) == TRAIN


def test_separate_held_out_rows_are_never_trained_even_those_that_are_not_evaluated() -> None:
    rows = make_many(30)
    both, sides = rows[:20] + rows[10:], split_apart(rows[:20], rows[10:], max_rows=5)
    assert np.bincount(sides, minlength=5).tolist() == [10, 5, 0, 10, 15]
    assert name_ids(both, sides, TRAIN) == {row.example_id for row in rows[:10]}
    assert name_ids(both, sides, EVAL, UNUSED) == {row.example_id for row in rows[10:]}


def test_conversation_of_two_datasets_stays_with_the_first_one_on_either_side() -> None:
    rows = make_many(100)
    sides = split(rows, rows, num_rows=30)
    assert np.bincount(sides[:100]).tolist() == [70, 30]
    assert sides[100:].tolist() == [DUPLICATE] * 100


TEXTS = st.sampled_from(["a", "A", " a", "b", "c d", "C  D"])
ROWS = st.lists(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0), max_size=30)


@settings(deadline=None)
@given(rows=ROWS, num_rows=st.integers(1, 10), seed=st.integers(0, 2**32 - 1))
def test_nothing_is_on_both_sides(rows: list[list[str]], num_rows: int, seed: int) -> None:
    conversations = [make(*texts, line=line) for line, texts in enumerate(rows, start=1)]
    sides = split(conversations, num_rows=num_rows, seed=seed, rows_per_piece=7)
    held_out = {row.keys[-1] for row, side in zip(conversations, sides, strict=True) if side == EVAL}
    assert len(held_out) <= num_rows
    for row, side in zip(conversations, sides, strict=True):
        assert side != TRAIN or held_out.isdisjoint(row.keys)
        assert side != LEAKED or not held_out.isdisjoint(row.keys)
    used = [row.example_id for row, side in zip(conversations, sides, strict=True) if side in (TRAIN, EVAL)]
    assert len(set(used)) == len(used)


@settings(deadline=None, max_examples=50)
@given(datasets=st.lists(ROWS, min_size=1, max_size=3), rows_per_piece=st.integers(1, 9))
def test_how_much_is_looked_at_at_once_does_not_show(datasets: list[list[list[str]]], rows_per_piece: int) -> None:
    conversations = [[make(*texts) for texts in rows] for rows in datasets]
    whole = split(*conversations, num_rows=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "IDS_AT_ONCE", 4)
        patch.setattr(splits, "KEYS_AT_ONCE", 1)
        patch.setattr(splits, "RANKS_KEPT", 0)
        assert split(*conversations, num_rows=3, rows_per_piece=rows_per_piece).tolist() == whole.tolist()
