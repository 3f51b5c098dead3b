import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from tasks.evaluation.answers import chrf, exact_match, repetition_rate, rouge_l, split_words


def test_exact_match_looks_past_white_space_only() -> None:
    assert exact_match(" The  cat\nsat. ", "The cat sat.") == 1.0
    assert exact_match("The cat sat", "The cat sat.") == 0.0
    assert exact_match("the cat sat.", "The cat sat.") == 0.0
    assert exact_match("", " ") == 1.0
    assert exact_match("", "x") == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("红色的灯笼。", ["红", "色", "的", "灯", "笼"]),
        ("GPT-4模型 v2,好!", ["gpt", "4", "模", "型", "v2", "好"]),
        ("ＡＢＣ１２", ["abc12"]),  # Full-width forms.
        ("𠀀𠀁", ["𠀀", "𠀁"]),  # Han beyond the first 65,536 characters.
        ("カタカナとひらがな", list("カタカナとひらがな")),
        ("Ça va, Émile? Größe", ["ça", "va", "émile", "größe"]),
        ("don’t — “so”", ["don", "t", "so"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # Vowel signs are not letters, but belong to the word.
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("😀 …", []),
    ],
)
def test_words_of_each_script(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_on_ascii_the_words_are_those_of_rouge_score(text: str) -> None:
    assert split_words(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_rouge_l_is_the_f_measure_of_the_common_subsequence() -> None:
    # Common: police the gunman, 3 of 4 words on either side.
    assert rouge_l("police kill the gunman", "police the gunman killed") == pytest.approx(3 / 4)
    # Common: 2 of 5 words of the answer, 2 of 2 of the reference: 2 * 0.4 * 1 / 1.4.
    assert rouge_l("a b c d e", "b d") == pytest.approx(0.8 / 1.4)
    # Chinese: 灯 笼 是 色, 4 of 5 characters on either side.
    assert rouge_l("灯笼是红色", "灯笼是绿色。") == pytest.approx(4 / 5)
    assert rouge_l("", "word") == 0.0
    assert rouge_l("😀", "😀") == 1.0
    assert rouge_l("words", "😀") == 0.0


def test_chrf_compares_character_pieces() -> None:
    assert chrf("灯笼是红色", "灯笼是红色") == 100.0
    assert chrf("", "灯笼") == 0.0
    assert chrf("xyz", "abc") == pytest.approx(0.0, abs=1e-6)
    # One-grams: a, b of 3: 2/3; two-grams: ab of 2: 1/2; three-grams: 0 of 1. No longer ones in three characters.
    assert chrf("abx", "aby") == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_repetition_rate_is_the_share_of_four_grams_seen_before() -> None:
    assert repetition_rate([]) == 0.0
    assert repetition_rate([1, 1, 1]) == 0.0
    assert repetition_rate([1, 2, 3, 4, 5, 6]) == 0.0
    # 1111 five times: one is new.
    assert repetition_rate([1] * 8) == pytest.approx(4 / 5)
    # 1234 2341 3412 4123 1234: one of five has occurred.
    assert repetition_rate([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


@given(st.text(max_size=40), st.text(max_size=40))
def test_measures_stay_in_their_bounds_and_are_full_for_the_reference(answer: str, reference: str) -> None:
    assert 0.0 <= rouge_l(answer, reference) <= 1.0
    assert 0.0 <= chrf(answer, reference) <= 100.0
    assert rouge_l(reference, reference) == 1.0
    assert exact_match(reference, reference) == 1.0
    if reference.strip():
        assert chrf(reference, reference) == pytest.approx(100.0)
