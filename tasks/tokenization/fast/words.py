"""Texts without added tokens as ids, word by word, exactly as a byte-level BPE gives them.

Such a tokenizer first splits a text into words by a regular expression, and then merges each word by itself: the ids of
a word never depend on its neighbours. Most words of a dataset are among its first few thousand, so that splitting and
looking up takes a small part of the time that the tokenizer's own way takes. What has not been shown to be split alike
here is left to the tokenizer: every character is compared before it is trusted, every word decoded before it is kept.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import regex
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from tasks.tokenization.encoding import uses_backend
from tasks.tokenization.labels import ID_TYPE

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CLASS = re.compile(r"\\p\{(\w+)\}")
_MOST_WORDS = 300_000
_LONGEST_KEPT_WORD = 64
# A character beside letters, digits, spaces, line ends, itself and an apostrophe.
_CONTEXTS = "{c}a{c}a A{c}A1{c}1 {c}a {c} 1'{c}'{c}l.{c}.{c}{c}\n{c}\n {c}  {c}\r\n{c}中{c}中 '{c} {c}'s"

Split = Callable[[str], list[str]]


class NotByWords(Exception):  # noqa: N818 - not an error: the tokenizer's own way is taken
    """A text whose ids are not known from its words."""


class Words(dict[str, bytes]):
    """Ids of the words seen so far, as bytes of ID_TYPE; those of a new one come from the model."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend = backend

    def __missing__(self, word: str) -> bytes:
        """Encode a word by itself.

        Raises:
            NotByWords: its ids do not decode to it.
        """
        mapped = "".join(piece for piece, _ in _TO_BYTES.pre_tokenize_str(word))
        numbers = [token.id for token in self.backend.model.tokenize(mapped)]
        if self.backend.decode(numbers, skip_special_tokens=False) != word:
            raise NotByWords
        ids = np.array(numbers, ID_TYPE).tobytes()
        if len(word) <= _LONGEST_KEPT_WORD:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


@dataclass(eq=False)
class WordEncoder:
    """A tokenizer's way of splitting, and the words seen so far."""

    backend: Any
    splits: tuple[Split, ...]
    """For any text, one after another."""
    ascii_splits: tuple[Split, ...]
    """The same for ASCII texts, faster."""
    is_composed: bool
    """Whether the tokenizer brings texts into the normal form NFC first."""
    words: Words
    known: set[str] = field(default_factory=set)
    """Characters that were shown to split alike."""

    def encode(self, text: str) -> bytes:
        """Return a text's ids.

        Raises:
            NotByWords: a character is split differently here, or the tokenizer would change the text.
        """
        if text.isascii():
            words = _apply(self.ascii_splits, text)
        else:
            self._check_characters(text)
            words = _apply(self.splits, text)
        if sum(map(len, words)) != len(text):
            raise NotByWords
        return b"".join(map(self.words.__getitem__, words))

    def _check_characters(self, text: str) -> None:
        if self.is_composed and not unicodedata.is_normalized("NFC", text):
            raise NotByWords
        if not self.known.issuperset(text):
            for character in set(text) - self.known:
                if not _splits_alike(self, self.splits, character):
                    raise NotByWords
                self.known.add(character)


_TO_BYTES: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_OPEN: WeakKeyDictionary[PreTrainedTokenizerBase, WordEncoder | None] = WeakKeyDictionary()


def open_words(tokenizer: PreTrainedTokenizerBase) -> WordEncoder | None:
    """Return a tokenizer's word encoder, or None where words are not encoded apart or not by means known here."""
    if tokenizer not in _OPEN:
        _OPEN[tokenizer] = _build(tokenizer)
    return _OPEN[tokenizer]


def _build(tokenizer: PreTrainedTokenizerBase) -> WordEncoder | None:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not uses_backend(tokenizer) or not _merges_words_apart(backend):
        return None
    if any(not token.content.strip() for token in tokenizer.added_tokens_decoder.values()):
        return None  # an added token of spaces splits texts before words are looked for
    normalizer = _state(backend.normalizer)
    patterns = _find_patterns(_state(backend.pre_tokenizer))
    if patterns is None or normalizer not in (None, {"type": "NFC"}) or _state(backend.decoder)["type"] != "ByteLevel":
        return None
    try:
        splits = tuple(_compile(pattern, regex) for pattern in patterns)
        ascii_splits = tuple(_compile(_to_ascii(pattern), re, re.ASCII) for pattern in patterns)
    except (re.error, regex.error, ValueError):
        return None
    words = WordEncoder(backend, splits, ascii_splits, normalizer is not None, Words(backend))
    ascii_characters = [chr(code) for code in range(128)]
    if not all(_splits_alike(words, way, c) for way in (splits, ascii_splits) for c in ascii_characters):
        return None
    words.known.update(ascii_characters)
    return words


def _merges_words_apart(backend: Any) -> bool:
    """Tell whether the model is a plain BPE, whose ids of a word depend on nothing else."""
    model = backend.model
    return (
        type(model).__name__ == "BPE"
        and not model.dropout
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and backend.pre_tokenizer is not None
        and backend.decoder is not None
    )


def _state(component: Any) -> Any:
    """Return a component of the Rust tokenizer as its JSON."""
    return None if component is None else json.loads(component.__getstate__())


def _find_patterns(state: dict[str, Any]) -> list[str] | None:
    """Return the patterns by which texts are split into words, or None where it is not by patterns alone."""
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    patterns: list[str] = []
    for number, step in enumerate(steps):
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            isolated = step["behavior"] == "Isolated" and not step["invert"]
            matches = step["behavior"] == "Removed" and step["invert"]
            if not (isolated or matches):
                return None
            patterns.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits":
            patterns.append(r"\p{N}|[^\p{N}]+" if step["individual_digits"] else r"\p{N}+|[^\p{N}]+")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"] and number == len(steps) - 1:
            return [*patterns, _GPT2_PATTERN] if step["use_regex"] else patterns
        else:
            return None
    return None


def _compile(pattern: str, engine: Any, flags: int = 0) -> Split:
    """Return a function that gives a text's matches."""
    compiled = engine.compile(pattern, flags)
    if compiled.groups:
        raise ValueError(f"groups in {pattern}")
    find: Split = compiled.findall
    return find


def _to_ascii(pattern: str) -> str:
    """Write the Unicode classes of a pattern out as the ASCII characters that they hold."""
    written, inside, position = [], False, 0
    while position < len(pattern):
        found = _CLASS.match(pattern, position)
        if found:
            kinds = [chr(code) for code in range(128) if unicodedata.category(chr(code)).startswith(found[1])]
            members = "".join(map(re.escape, kinds))
            written.append(members if inside else f"[{members}]" if members else "(?!)")
            position = found.end()
            continue
        length = 2 if pattern[position] == "\\" else 1
        piece = pattern[position : position + length]
        inside = piece == "[" or (inside and piece != "]")
        written.append(piece)
        position += length
    return "".join(written)


def _apply(splits: Iterable[Split], text: str) -> list[str]:
    """Split a text by each way in turn."""
    words = [text]
    for split in splits:
        words = split(words[0]) if len(words) == 1 else [word for piece in words for word in split(piece)]
    return words


def _splits_alike(words: WordEncoder, splits: tuple[Split, ...], character: str) -> bool:
    """Tell whether the tokenizer splits this character as the patterns do here, beside all kinds of others."""
    if unicodedata.category(character) in ("Cn", "Cs"):
        return False
    text = _CONTEXTS.format(c=character)
    if words.is_composed and words.backend.normalizer.normalize_str(text) != text:
        return False
    if not text.isascii() and splits is words.ascii_splits:
        text = "".join(c for c in text if c.isascii())
    ours = _apply(splits, text)
    starts = [0]
    for word in ours:
        starts.append(starts[-1] + len(word))
    theirs = [span for _, span in words.backend.pre_tokenizer.pre_tokenize_str(text)]
    return theirs == list(pairwise(starts))
