import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from tasks.ingestion.identity import Conversation, make_conversation
from tasks.ingestion.pieces import make_index
from tasks.ingestion.splits import (
    DUPLICATE,
    EVAL,
    LEAKED,
    TRAIN,
    UNUSED,
    Sides,
    count_held_out,
    count_shared_prompts,
    hold_out,
    keep_all,
    separate,
    split_rows,
)


def make(*texts: str, line: int = 1) -> Conversation:
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return make_conversation(messages, None, "rows.json", line)


def make_many(num_rows: int) -> pl.DataFrame:
    return make_index(
        [make(f"question {number}", f"answer {number}", line=number) for number in range(1, num_rows + 1)]
    )


def split_sources(train: pl.DataFrame, held_out: pl.DataFrame, max_rows: int, seed: int) -> tuple[pl.DataFrame, Sides]:
    """Both datasets' rows in one, and where each goes, as in a run with a held-out dataset."""
    rows = pl.concat([train, held_out])
    return rows, separate(rows, [keep_all(train), hold_out(held_out, max_rows, seed)])


def name_ids(rows: pl.DataFrame, sides: Sides, side: int = EVAL) -> set[bytes]:
    return set(rows.filter(sides == side)["example_id"])


def test_the_first_of_equal_rows_stays() -> None:
    rows = make_index([make("a", "b", line=1), make("c", "d", line=2), make("a", "b", line=3)])
    assert keep_all(rows).tolist() == [TRAIN, TRAIN, DUPLICATE]


def test_number_of_held_out_rows() -> None:
    assert count_held_out(100, 0.1, 1000) == 10
    assert count_held_out(100, 0.1, 7) == 7
    assert count_held_out(5, 0.1, 1000) == 1
    assert count_held_out(3, 0.99, 1000) == 2
    assert count_held_out(1, 0.5, 1000) == 0
    assert count_held_out(0, 0.5, 1000) == 0


def test_split_depends_on_seed_and_contents_and_not_on_order_or_copies() -> None:
    rows = make_many(200)
    first = split_rows(rows, 0.1, 1000, seed=1)
    assert np.bincount(first).tolist() == [180, 20]
    held_out = name_ids(rows, first)
    assert name_ids(rows[::-1], split_rows(rows[::-1], 0.1, 1000, seed=1)) == held_out
    copies = pl.concat([rows] * 3)
    assert name_ids(copies, split_rows(copies, 0.1, 1000, seed=1)) == held_out
    assert name_ids(rows, split_rows(rows, 0.1, 1000, seed=2)) != held_out


def test_a_row_more_moves_at_most_one_row_across_the_border() -> None:
    rows = make_many(201)
    before = name_ids(rows[:200], split_rows(rows[:200], 0.1, 1000, seed=0))
    after = name_ids(rows, split_rows(rows, 0.1, 1000, seed=0))
    assert len(after) == 20
    assert len(before - after) <= 1


def test_training_row_that_is_a_held_out_one_but_for_case_and_spaces_is_a_leak() -> None:
    train = make_index([make("What is it?", "A cat"), make("what  is it? ", "a CAT"), make("What is it?", "A dog")])
    rows, sides = split_sources(train, make_index([make("What is it?", "A cat")]), 1000, seed=0)
    assert sides.tolist() == [LEAKED, LEAKED, TRAIN, EVAL]
    assert count_shared_prompts(rows[2:3], rows[3:]) == 1


def test_training_row_that_begins_with_a_held_out_conversation_is_a_leak() -> None:
    def split(train: Conversation, held_out: Conversation) -> int:
        return int(split_sources(make_index([train]), make_index([held_out]), 1000, seed=0)[1][0])

    assert split(make("a", "b", "c", "d"), make("a", "b")) == LEAKED
    assert split(make("a", "b", "c", "d", "e", "f"), make("a", "b", "c", "d")) == LEAKED
    assert split(make("a", "b"), make("a", "b", "c", "d")) == TRAIN
    assert split(make("c", "d", "a", "b"), make("a", "b")) == TRAIN


def test_separate_held_out_rows_are_never_trained_even_those_that_are_not_evaluated() -> None:
    rows = make_many(30)
    both, sides = split_sources(rows[:20], rows[10:], max_rows=5, seed=0)
    assert np.bincount(sides, minlength=5).tolist() == [10, 5, 0, 10, 15]
    assert name_ids(both, sides, TRAIN) == set(rows[:10]["example_id"])
    assert name_ids(both, sides, EVAL) | name_ids(both, sides, UNUSED) == set(rows[10:]["example_id"])


def test_conversation_of_two_datasets_stays_with_the_first_one_on_either_side() -> None:
    rows = make_many(100)
    sides = separate(pl.concat([rows, rows]), [split_rows(rows, 0.3, 1000, seed=0)] * 2)
    assert np.bincount(sides[:100]).tolist() == [70, 30]
    assert sides[100:].tolist() == [DUPLICATE] * 100


TEXTS = st.sampled_from(["a", "A", " a", "b", "c d", "C  D"])


@given(
    rows=st.lists(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0), max_size=30),
    fraction=st.floats(0.01, 0.99),
    max_rows=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_is_on_both_sides(rows: list[list[str]], fraction: float, max_rows: int, seed: int) -> None:
    conversations = [make(*texts, line=line) for line, texts in enumerate(rows, start=1)]
    sides = split_rows(make_index(conversations), fraction, max_rows, seed)
    held_out = {row.keys[-1] for row, side in zip(conversations, sides, strict=True) if side == EVAL}
    assert len(held_out) <= max_rows
    for row, side in zip(conversations, sides, strict=True):
        assert side != TRAIN or held_out.isdisjoint(row.keys)
        assert side != LEAKED or not held_out.isdisjoint(row.keys)
    used = [row.example_id for row, side in zip(conversations, sides, strict=True) if side in (TRAIN, EVAL)]
    assert len(set(used)) == len(used)
