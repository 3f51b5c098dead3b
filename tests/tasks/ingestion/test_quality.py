import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ingestion.identity import Conversation, make_conversation
from tasks.ingestion.near_duplicates import Likest, find_near_duplicates
from tasks.ingestion.pieces import make_index
from tasks.ingestion.quality import check_quality, describe_rows, find_text_problems
from tasks.ingestion.runs import hash_runs


def make(prompt: str, answer: str, line: int = 1) -> Conversation:
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
    checks = check_quality(make_index(rows))
    assert checks["mojibake"] == {"num_rows": 2, "places": ["rows.json:2", "rows.json:4"]}
    assert checks["control_characters"] == {"num_rows": 2, "places": ["rows.json:3", "rows.json:4"]}
    assert checks["replacement_characters"] == {"num_rows": 0, "places": []}
    assert '"cafÃ©"' in rows[1].messages


def test_length_outliers_are_far_from_the_others() -> None:
    rows = [make("x" * (40 + line), "y", line) for line in range(1, 31)]
    assert check_quality(make_index(rows))["length_outlier"]["num_rows"] == 0
    checks = check_quality(make_index([*rows, make("x" * 5000, "y", 31), make("x", "y", 32)]))
    assert checks["length_outlier"] == {"num_rows": 2, "places": ["rows.json:31", "rows.json:32"]}


def test_statistics_of_a_side() -> None:
    messages = [("user", "abc"), ("assistant", "de"), ("user", "f"), ("assistant", "ghij")]
    long = make_conversation([{"role": role, "content": text} for role, text in messages], [{"x": 1}], "s", 1)
    statistics = describe_rows(make_index([long, make("ab", "c")]))
    assert (statistics["num_rows"], statistics["num_multi_turn"], statistics["num_with_tools"]) == (2, 1, 1)
    assert statistics["prompt_characters"]["total"] == 6
    assert (statistics["answer_characters"]["min"], statistics["answer_characters"]["max"]) == (1, 6)
    assert describe_rows(make_index([]))["turns"]["max"] is None


WORDS = [
    *["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven", "wise"],
    *["owls", "watch", "from", "an", "oak", "near", "a"],
]


def find(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> list[Likest]:
    numbers = np.arange(len(train))
    blocks = [(numbers, hash_runs([row.text for row in train]))] if train else []
    return find_near_duplicates(blocks, hash_runs([row.text for row in held_out]))


def test_near_duplicate_is_found_with_its_exact_jaccard_index() -> None:
    # The marks at the start make a run of their own, and every word ends one more; the answer is the last word.
    held_out = make(" ".join(WORDS), "yes")
    near = make(" ".join(WORDS), "no")
    assert len(WORDS) == 19
    assert find([make("other", "words"), near], [make("something", "else"), held_out]) == [Likest(1, 1, 20 / 22)]


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
    assert find(train, [make(base, "z")]) == [Likest(0, 1, 1.0)]


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
        (np.arange(low, high), hash_runs([text.encode() for text in train[low:high]]))
        for low, high in ((0, cut), (cut, len(train)))
    ]
    found = find_near_duplicates(blocks, hash_runs([text.encode() for text in held_out]), threshold)
    expected = []
    for number, text in enumerate(held_out):
        runs = list_runs(text)
        scores = [len(runs & list_runs(other)) / len(runs | list_runs(other)) for other in train]
        if scores and max(scores) >= threshold:
            expected.append(Likest(number, scores.index(max(scores)), max(scores)))
    assert found == sorted(expected, key=lambda pair: (-pair.jaccard, pair.held_out))
