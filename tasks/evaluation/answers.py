"""What an answer is worth: measures of one answer against one reference.

ROUGE-L and chrF are those of `rouge-score` and `sacrebleu`; only the splitting into words for ROUGE-L is ours,
because the library's own keeps nothing but a-z and 0-9.
"""

import unicodedata
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any

from tasks.lean_imports import hidden

# nltk tells words apart and reports on classifiers, portalocker locks across machines: none of it is used here.
with hidden("portalocker.redis", "scipy.stats", "sklearn"):
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

REPETITION_ORDER = 4
"""Tokens of an n-gram that counts as repeated; as seq-rep-4 in Welleck et al. 2020, arXiv:1908.04319."""

_UNSPACED_RANGES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # Ideographic iteration mark, closing mark, zero
    (0x3040, 0x30FF),  # Hiragana, katakana
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han compatibility
    (0x20000, 0x3FFFF),  # Han, extensions B and later
)
"""Scripts written without spaces between words (Unicode blocks): a character is a word there."""


def exact_match(answer: str, reference: str) -> float:
    """Return 1.0 when both texts are the same but for white space around and between words, else 0.0."""
    return float(answer.split() == reference.split())


def split_words(text: str) -> list[str]:
    """Split text into lower-case words without punctuation; a Chinese or Japanese character is a word.

    On plain ASCII this gives the words of rouge-score's default tokenizer. Text is NFKC-normalized first, so that
    full-width letters and digits are like their plain forms.
    """
    words: list[str] = []
    in_word, joins = False, False  # The character before is part of a word; a letter may join it.
    for character in unicodedata.normalize("NFKC", text).lower():
        category = unicodedata.category(character)
        if category == "Cf":  # Joiners and direction marks neither belong to a word nor end it.
            continue
        is_mark = category.startswith("M")  # Vowel signs and accents are not letters, but part of them.
        if in_word and (is_mark or (joins and character.isalnum() and not _is_unspaced(character))):
            words[-1] += character
            continue
        in_word = character.isalnum()
        joins = in_word and not _is_unspaced(character)
        if in_word:
            words.append(character)
    return words


def _is_unspaced(character: str) -> bool:
    """Tell whether the character's script has no spaces between words."""
    code = ord(character)
    return any(low <= code <= high for low, high in _UNSPACED_RANGES)


class _Words:
    """The form in which rouge-score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """Split text into words."""
        return split_words(text)


@cache
def _rouge() -> Any:
    return RougeScorer(["rougeL"], tokenizer=_Words())


@cache
def _chrf() -> Any:
    return CHRF()


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words, 0 to 1 (ROUGE-L, Lin 2004).

    A reference without any word (such as an emoji) has no subsequence: there it is exact_match.
    """
    if not split_words(reference):
        return exact_match(answer, reference)
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def chrf(answer: str, reference: str) -> float:
    """Return sentence chrF, 0 to 100: the F2 of character n-grams of order 1 to 6 (Popović 2015), as in sacrebleu."""
    # Rounding in the library can give a hair more than 100.
    return min(100.0, float(_chrf().sentence_score(answer, [reference]).score))


def repetition_rate(tokens: Sequence[Hashable]) -> float:
    """Return the share of 4-grams that occurred before in the same answer: `1 - distinct / all`.

    0.0 when nothing repeats and for an answer of fewer than four tokens; near 1.0 for a loop.
    """
    num_grams = len(tokens) - REPETITION_ORDER + 1
    if num_grams < 1:
        return 0.0
    distinct = {tuple(tokens[at : at + REPETITION_ORDER]) for at in range(num_grams)}
    return 1.0 - len(distinct) / num_grams
