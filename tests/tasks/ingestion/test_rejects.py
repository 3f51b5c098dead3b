import pytest

from tasks.ingestion.errors import DataError, RowError
from tasks.ingestion.rejects import Reject, Tally, check_budget, join_tallies, make_reject


def make_many(*reasons: str) -> list[Reject]:
    return [make_reject("a.jsonl", line, RowError(reason, f"row {line}"), {}) for line, reason in enumerate(reasons, 1)]


def tally(*reasons: str) -> Tally:
    counted = Tally()
    counted.add(make_many(*reasons))
    return counted


def test_reject_keeps_place_reason_and_the_first_characters_of_the_row() -> None:
    reject = make_reject("a.jsonl", 7, RowError("not_text", "why"), {"é": "x" * 3000})
    assert reject[1:5] == ("a.jsonl", 7, "not_text", "why")
    assert reject.raw == '{"é": "' + "x" * 1993
    assert len(reject.example_id) == 32


def test_a_row_that_is_no_line_is_named_as_a_row() -> None:
    found = Tally()
    found.add(make_reject(name, 7, RowError("broken_text", ""), {}) for name in ("a.jsonl", "b.csv", "c.Parquet"))
    assert found.places == {"broken_text": ["a.jsonl:7", "b.csv row 7", "c.Parquet row 7"]}


def test_what_cannot_be_encoded_is_still_recorded() -> None:
    assert make_reject("a", 1, RowError("broken_text", "\ud800"), {"a": "\ud800"}).raw == '{"a": "?"}'
    assert make_reject("a", 1, RowError("not_text", "x"), {"a": b"\x00"}).raw == '{"a": "b\'\\\\x00\'"}'


def test_counts_are_by_reason() -> None:
    assert tally("not_text", "empty_answer", "empty_answer").by_reason == {"empty_answer": 2, "not_text": 1}


def test_tallies_of_several_datasets_are_those_of_all_their_rows() -> None:
    reasons = ["not_text", *["empty_answer"] * 9, "bad_tools", *["empty_answer"] * 3]
    rows, whole, parts = make_many(*reasons), Tally(), [Tally(), Tally()]
    whole.add(rows)
    parts[0].add(rows[:8])
    parts[1].add(rows[8:])
    assert join_tallies(parts) == whole
    assert whole.first == rows[:10]
    assert whole.places["empty_answer"] == [f"a.jsonl:{line}" for line in range(2, 7)]


def test_budget_is_a_part_of_all_rows_and_just_that_part_is_allowed() -> None:
    rejects = tally("empty_answer")
    check_budget(rejects, 100, 0.01, "a.jsonl")
    check_budget(tally(), 0, 0.0, "a.jsonl")
    check_budget(rejects, 1, 1.0, "a.jsonl")
    with pytest.raises(DataError):
        check_budget(rejects, 99, 0.01, "a.jsonl")


def test_broken_budget_lists_reasons_places_limit_and_remedy() -> None:
    rejects = tally(*["empty_answer"] * 7, "ends_with_user")
    with pytest.raises(DataError) as caught:
        check_budget(rejects, 20, 0.01, "rows")
    text = str(caught.value)
    assert text.startswith("rows: 8 of 20 rows (40.0%) are rejected, and data.max_rejected_fraction allows 1.0%:\n")
    assert "7 x empty_answer" in text
    assert "a.jsonl:1, a.jsonl:2, a.jsonl:3, a.jsonl:4, a.jsonl:5, …" in text
    assert (
        "1 x ends_with_user (the last message is the user's: nothing answers it): a.jsonl:8\n    first: row 8" in text
    )
    assert text.endswith("raise data.max_rejected_fraction to train without them.")
