"""JSON parsed as `json` does, by orjson where that gives the same.

orjson makes integers beyond 64 bits floats; NaN and half surrogates it refuses, so that they are left to `json`.
"""

import json
from typing import Any

import orjson

NotFast = orjson.JSONDecodeError
_ZEROS = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else byte for byte in range(256))
_LONG_NUMBER = b"0" * 19


def parse_fast(data: bytes) -> Any:
    """Parse a value as json.loads does, or not at all.

    Raises:
        NotFast: it is no JSON, or orjson would take it otherwise.
    """
    if _LONG_NUMBER in data.translate(_ZEROS):
        raise NotFast("a long number", "", 0)
    return orjson.loads(data)


def parse(text: str) -> Any:
    """Parse a value.

    Raises:
        json.JSONDecodeError: it is no JSON.
    """
    try:
        return parse_fast(text.encode())
    except (NotFast, UnicodeEncodeError):
        return json.loads(text)
