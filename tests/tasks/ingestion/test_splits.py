from hypothesis import given
from hypothesis import strategies as st

from tasks.ingestion.identity import Conversation, make_conversation
from tasks.ingestion.splits import (
    Split,
    count_held_out,
    count_shared_prompts,
    drop_duplicates,
    hold_out,
    keep_all,
    separate,
    split_rows,
)


def make(*texts: str, line: int = 1) -> Conversation:
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return make_conversation(messages, None, "rows.json", line)


def make_many(num_rows: int) -> list[Conversation]:
    return [make(f"question {number}", f"answer {number}", line=number) for number in range(1, num_rows + 1)]


def split_sources(train: list[Conversation], held_out: list[Conversation], max_rows: int, seed: int) -> Split:
    """Both datasets' parts in one, as a run with a held-out dataset has them."""
    parts = separate([keep_all(train), hold_out(held_out, max_rows, seed)])
    return Split(*([*first, *second] for first, second in zip(*parts, strict=True)))


def name_ids(rows: list[Conversation]) -> set[str]:
    return {row.example_id for row in rows}


def test_the_first_of_equal_rows_stays() -> None:
    kept, duplicate = drop_duplicates([make("a", "b", line=1), make("c", "d", line=2), make("a", "b", line=3)])
    assert [row.line for row in kept] == [1, 2]
    assert [row.line for row in duplicate] == [3]


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
    assert (len(first.train), len(first.eval)) == (180, 20)
    assert name_ids(split_rows(rows[::-1], 0.1, 1000, seed=1).eval) == name_ids(first.eval)
    assert name_ids(split_rows(rows * 3, 0.1, 1000, seed=1).eval) == name_ids(first.eval)
    assert name_ids(split_rows(rows, 0.1, 1000, seed=2).eval) != name_ids(first.eval)


def test_a_row_more_moves_at_most_one_row_across_the_border() -> None:
    rows = make_many(201)
    before, after = split_rows(rows[:200], 0.1, 1000, seed=0), split_rows(rows, 0.1, 1000, seed=0)
    assert len(after.eval) == 20
    assert len(name_ids(before.eval) - name_ids(after.eval)) <= 1


def test_both_sides_keep_the_order_of_the_rows() -> None:
    split = split_rows(make_many(50), 0.3, 1000, seed=0)
    assert [row.line for row in split.train] == sorted(row.line for row in split.train)
    assert [row.line for row in split.eval] == sorted(row.line for row in split.eval)


def test_training_row_that_is_a_held_out_one_but_for_case_and_spaces_is_a_leak() -> None:
    train = [make("What is it?", "A cat"), make("what  is it? ", "a CAT"), make("What is it?", "A dog")]
    split = split_sources(train, [make("What is it?", "A cat")], 1000, seed=0)
    assert split.leaked == train[:2]
    assert split.train == train[2:]
    assert count_shared_prompts(split.train, split.eval) == 1


def test_training_row_that_begins_with_a_held_out_conversation_is_a_leak() -> None:
    longer = make("a", "b", "c", "d")
    assert split_sources([longer], [make("a", "b")], 1000, seed=0).leaked == [longer]
    assert split_sources([make("a", "b")], [longer], 1000, seed=0).leaked == []
    assert split_sources([make("c", "d", "a", "b")], [make("a", "b")], 1000, seed=0).leaked == []


def test_separate_held_out_rows_are_never_trained_even_those_that_are_not_evaluated() -> None:
    rows = make_many(30)
    split = split_sources(rows[:20], rows[10:], max_rows=5, seed=0)
    assert (len(split.train), len(split.eval), len(split.leaked), len(split.unused)) == (10, 5, 10, 15)
    assert name_ids(split.train) == name_ids(rows[:10])
    assert name_ids(split.eval) | name_ids(split.unused) == name_ids(rows[10:])


TEXTS = st.sampled_from(["a", "A", " a", "b", "c d", "C  D"])


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=30),
    fraction=st.floats(0.01, 0.99),
    max_rows=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_goes_to_one_place_and_nothing_is_on_both_sides(
    rows: list[tuple[str, str]], fraction: float, max_rows: int, seed: int
) -> None:
    conversations = [make(*texts, line=line) for line, texts in enumerate(rows, start=1)]
    split = split_rows(conversations, fraction, max_rows, seed)
    lines = [row.line for side in (split.train, split.eval, split.duplicate, split.leaked) for row in side]
    assert sorted(lines) == list(range(1, len(rows) + 1))
    assert len(split.eval) <= max_rows
    assert {row.keys[-1] for row in split.train}.isdisjoint(row.keys[-1] for row in split.eval)
    assert len(name_ids(split.train + split.eval)) == len(split.train) + len(split.eval)
