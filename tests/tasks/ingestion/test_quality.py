import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ingestion.pieces import make_index
from tasks.ingestion.row_statistics import (
    Flagged,
    RowStatistics,
    describe_counts,
    find_fences,
    find_outliers,
)
from tasks.ingestion.rows.identity import UsableRow, make_conversation
from tasks.ingestion.rows.quality import find_text_problems
from tasks.ingestion.rows.shingles import hash_shingles
from tasks.ingestion.splitting.near_duplicates import BestMatch, find_near_duplicates
from tests.tasks.ingestion.conftest import write_index


def make(prompt: str, answer: str, line: int = 1) -> UsableRow:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return make_conversation(messages, None, "rows.json", line)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("plain text,\twith tab\r\nand line ends", ()),
        ("naïve café — “quoted” … 你好 مرحبا 👋🏽", ()),
        ("bell \x07", ("control_characters",)),
        ("\x1b[31mred", ("control_characters",)),
        ("lost \ufffd", ("replacement_characters",)),
        ("It doesnâ€™t work, cafÃ©", ("mojibake",)),
        ("\x00 \ufffd schÃ¶n", ("control_characters", "replacement_characters", "mojibake")),
    ],
)
def test_text_problems(text: str, problems: tuple[str, ...]) -> None:
    assert find_text_problems(text) == problems


def test_problems_are_counted_with_their_places_and_the_rows_are_kept_as_they_are() -> None:
    rows = [make("a", "b"), make("cafÃ©", "b", 2), make("a", "\x07", 3), make("schÃ¶n", "\x07", 4)]
    problems = count(rows).problems
    assert problems["mojibake"] == Flagged(2, [1, 3])
    assert problems["control_characters"] == Flagged(2, [2, 3])
    assert problems["replacement_characters"] == Flagged(0, [])
    assert '"cafÃ©"' in rows[1].messages


def test_length_outliers_are_far_from_the_others_and_the_trained_ones_come_first(tmp_path: Path) -> None:
    rows = [make("x" * (40 + line), "y", line) for line in range(1, 31)]
    assert find_among(tmp_path, rows, range(30)) == Flagged(0, [])
    more = [make("x" * 5000, "y", 31), *rows, make("x", "y", 32)]
    assert find_among(tmp_path, more, range(1, 32)) == Flagged(2, [31, 0])
    assert find_among(tmp_path, more[20:], range(12)) == Flagged(0, [])


def find_among(folder: Path, rows: Sequence[UsableRow], trained: Iterable[int]) -> Flagged:
    index = write_index(folder, rows, rows_per_piece=10)
    train = np.isin(np.arange(len(rows)), list(trained))
    return find_outliers(index, train, ~train, count(rows).lengths)


def test_statistics_of_a_side() -> None:
    messages = [("user", "abc"), ("assistant", "de"), ("user", "f"), ("assistant", "ghij")]
    long = make_conversation([{"role": role, "content": text} for role, text in messages], [{"x": 1}], "s", 1)
    statistics = count([long, make("ab", "c")]).describe()
    assert (statistics["num_rows"], statistics["num_multi_turn"], statistics["num_with_tools"]) == (2, 1, 1)
    assert statistics["prompt_characters"]["total"] == 6
    assert (statistics["answer_characters"]["min"], statistics["answer_characters"]["max"]) == (1, 6)
    assert RowStatistics().describe()["turns"]["max"] is None


def count(rows: Sequence[UsableRow]) -> RowStatistics:
    statistics = RowStatistics()
    statistics.add(np.arange(len(rows)), make_index(rows))
    return statistics


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40))
def test_percentiles_of_counted_values_are_those_of_the_values(values: list[int]) -> None:
    described, series = describe_counts(Counter(values)), pl.Series(values)
    for part in (10, 50, 90, 99):
        assert described[f"p{part}"] == series.quantile(part / 100, "nearest")
    assert (described["min"], described["max"], described["total"]) == (min(values), max(values), sum(values))


@given(st.lists(st.integers(0, 60), min_size=20, max_size=60))
def test_fences_of_counted_lengths_are_those_of_the_lengths(lengths: list[int]) -> None:
    low, high = np.quantile(np.log1p(lengths), [0.25, 0.75])
    reach = max(3 * (high - low), np.log(2))
    assert find_fences(Counter(lengths)) == pytest.approx((low - reach, high + reach), rel=1e-12)


WORDS = [
    *["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven", "wise"],
    *["owls", "watch", "from", "an", "oak", "near", "a"],
]


def find(train: Sequence[UsableRow], held_out: Sequence[UsableRow]) -> list[BestMatch]:
    numbers = np.arange(len(train))
    blocks = [(numbers, hash_shingles([row.text for row in train]))] if train else []
    return find_near_duplicates(blocks, hash_shingles([row.text for row in held_out]))


def test_near_duplicate_is_found_with_its_exact_jaccard_index() -> None:
    # The marks at the start make a run of their own, and every word ends one more; the answer is the last word.
    held_out = make(" ".join(WORDS), "yes")
    near = make(" ".join(WORDS), "no")
    assert len(WORDS) == 19
    assert find([make("other", "words"), near], [make("something", "else"), held_out]) == [BestMatch(1, 1, 20 / 22)]


def test_case_spaces_and_punctuation_do_not_hide_a_near_duplicate() -> None:
    (pair,) = find([make(" ".join(WORDS).upper() + "!", "Yes.")], [make("\n".join(WORDS), "yes")])
    assert pair.jaccard == 1.0


def test_chinese_is_compared_by_characters() -> None:
    text = "细胞理论是生物科学的一个理论它认为所有生命体都是由微小的基本单元细胞所构成"
    (pair,) = find([make(text, "对")], [make(text, "错")])
    assert 0.9 < pair.jaccard < 1.0


def test_unlike_rows_and_empty_sides_give_nothing() -> None:
    assert find([make("one two three four", "x")], [make("five six seven eight", "y")]) == []
    assert find([], [make("a", "b")]) == []
    assert find([make("a", "b")], []) == []


def test_likest_training_row_is_named() -> None:
    base = " ".join(WORDS)
    train = [make(base + " one", "z"), make(base, "z"), make(base + " two", "z"), make(base, "z")]
    assert find(train, [make(base, "z")]) == [BestMatch(0, 1, 1.0)]


def list_runs(text: str) -> set[tuple[str, ...]]:
    words = ["_"] * 3 + re.findall(r"\w+", text)
    return {tuple(words[place : place + 3]) for place in range(len(words) - 2)}


# Words around the eight bytes that are hashed at a time; é makes the text take the way of other scripts.
WORD = st.sampled_from(["a", "b", "seven77", "eight888", "nine99999", "x" * 16, "x" * 17, "caf\u00e9", "- ,"])
TEXT = st.lists(WORD, min_size=1, max_size=14).map(" ".join)


@given(train=st.lists(TEXT, max_size=12), held_out=st.lists(TEXT, min_size=1, max_size=8), data=st.data())
def test_all_pairs_are_found_that_a_plain_comparison_of_sets_finds(
    train: list[str], held_out: list[str], data: st.DataObject
) -> None:
    threshold = data.draw(st.sampled_from([0.5, 0.6, 0.75, 0.8, 1.0]))
    cut = data.draw(st.integers(0, len(train)))
    blocks = [
        (np.arange(low, high), hash_shingles([text.encode() for text in train[low:high]]))
        for low, high in ((0, cut), (cut, len(train)))
    ]
    found = find_near_duplicates(blocks, hash_shingles([text.encode() for text in held_out]), threshold)
    expected = []
    for number, text in enumerate(held_out):
        runs = list_runs(text)
        scores = [len(runs & list_runs(other)) / len(runs | list_runs(other)) for other in train]
        if scores and max(scores) >= threshold:
            expected.append(BestMatch(number, scores.index(max(scores)), max(scores)))
    assert found == sorted(expected, key=lambda pair: (-pair.jaccard, pair.held_out))
