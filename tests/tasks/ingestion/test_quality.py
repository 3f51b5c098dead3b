import pytest

from tasks.ingestion.identity import Conversation, make_conversation
from tasks.ingestion.near_duplicates import find_near_duplicates
from tasks.ingestion.quality import check_quality, describe_rows, find_text_problems


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
    checks = check_quality(rows)
    assert checks["mojibake"] == {"num_rows": 2, "places": ["rows.json:2", "rows.json:4"]}
    assert checks["control_characters"] == {"num_rows": 2, "places": ["rows.json:3", "rows.json:4"]}
    assert checks["replacement_characters"] == {"num_rows": 0, "places": []}
    assert '"cafÃ©"' in rows[1].messages


def test_length_outliers_are_far_from_the_others() -> None:
    rows = [make("x" * (40 + line), "y", line) for line in range(1, 31)]
    assert check_quality(rows)["length_outlier"]["num_rows"] == 0
    checks = check_quality([*rows, make("x" * 5000, "y", 31), make("x", "y", 32)])
    assert checks["length_outlier"] == {"num_rows": 2, "places": ["rows.json:31", "rows.json:32"]}


def test_statistics_of_a_side() -> None:
    messages = [("user", "abc"), ("assistant", "de"), ("user", "f"), ("assistant", "ghij")]
    long = make_conversation([{"role": role, "content": text} for role, text in messages], [{"x": 1}], "s", 1)
    statistics = describe_rows([long, make("ab", "c")])
    assert (statistics["num_rows"], statistics["num_multi_turn"], statistics["num_with_tools"]) == (2, 1, 1)
    assert statistics["prompt_characters"]["total"] == 6
    assert (statistics["answer_characters"]["min"], statistics["answer_characters"]["max"]) == (1, 6)
    assert describe_rows([])["turns"]["max"] is None


WORDS = [
    *["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven", "wise"],
    *["owls", "watch", "from", "an", "oak", "near", "a"],
]


def test_near_duplicate_is_found_with_its_exact_jaccard_index() -> None:
    # The marks at the start make a run of their own, and every word ends one more; the answer is the last word.
    held_out = make(" ".join(WORDS), "yes", 7)
    near = make(" ".join(WORDS), "no", 3)
    (pair,) = find_near_duplicates([make("other", "words"), near], [make("something", "else"), held_out])
    assert (pair.eval_place, pair.train_place) == ("rows.json:7", "rows.json:3")
    assert len(WORDS) == 19
    assert pair.jaccard == 20 / 22


def test_case_spaces_and_punctuation_do_not_hide_a_near_duplicate() -> None:
    (pair,) = find_near_duplicates([make(" ".join(WORDS).upper() + "!", "Yes.")], [make("\n".join(WORDS), "yes")])
    assert pair.jaccard == 1.0


def test_chinese_is_compared_by_characters() -> None:
    text = "细胞理论是生物科学的一个理论它认为所有生命体都是由微小的基本单元细胞所构成"
    (pair,) = find_near_duplicates([make(text, "对")], [make(text, "错")])
    assert 0.9 < pair.jaccard < 1.0


def test_unlike_rows_and_empty_sides_give_nothing() -> None:
    assert find_near_duplicates([make("one two three four", "x")], [make("five six seven eight", "y")]) == []
    assert find_near_duplicates([], [make("a", "b")]) == []
    assert find_near_duplicates([make("a", "b")], []) == []


def test_likest_training_row_is_named() -> None:
    base = " ".join(WORDS)
    train = [make(base + " one", "z", 1), make(base, "z", 2), make(base + " two", "z", 3)]
    (pair,) = find_near_duplicates(train, [make(base, "z", 9)])
    assert (pair.train_place, pair.jaccard) == ("rows.json:2", 1.0)
