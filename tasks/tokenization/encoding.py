"""Text to ids and back, one by one or many at once."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from tasks.prompts import encode_text as encode

__all__ = ["decode", "decode_batch", "encode", "encode_batch", "uses_backend"]

_SAME_AS_BACKEND: WeakKeyDictionary[PreTrainedTokenizerBase, bool] = WeakKeyDictionary()
_PROBE = " Ein Beispiel,\n\n  例子 <tag> 1234 'tis  "


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode many texts, each as `encode` does; in Rust where the tokenizer is backed by it."""
    if not uses_backend(tokenizer):
        return [encode(tokenizer, text) for text in texts]
    encode(tokenizer, "")  # switches padding and truncation off, as every call does
    backend: Any = tokenizer.backend_tokenizer
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode ids to text with every token and space kept."""
    return decode_batch(tokenizer, [list(ids)])[0]


def decode_batch(tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> list[str]:
    """Decode many rows of ids, each as `decode` does."""
    if uses_backend(tokenizer):
        backend: Any = tokenizer.backend_tokenizer
        texts: list[str] = backend.decode_batch(list(rows), skip_special_tokens=False)
        return texts
    return [str(tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)) for row in rows]


def uses_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the Rust tokenizer behind this one can be called directly; found out once by comparing."""
    if tokenizer not in _SAME_AS_BACKEND:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        same = hasattr(backend, "encode_batch_fast") and hasattr(backend, "decode_batch")
        if same:
            tokens = list(tokenizer.added_tokens_decoder.values())[:50]
            probe = _PROBE + " ".join(token.content for token in tokens)
            ids = encode(tokenizer, probe)
            spaced = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            same = backend.encode_batch_fast([probe], add_special_tokens=False)[0].ids == ids
            same = same and backend.decode_batch([ids], skip_special_tokens=False)[0] == spaced
        _SAME_AS_BACKEND[tokenizer] = same
    return _SAME_AS_BACKEND[tokenizer]
