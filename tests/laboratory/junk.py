"""Values and bytes that nobody expects, drawn from a seed."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

_TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\x00",
        "\x1b]0;title\x07",
        "\u202eabc",
        "\ud800",
        "é" * 300,
        "𝕏🎉",
        "null",
        "NaN",
        "true",
        "~",
        "..",
        "/",
    ),
    *("~nosuchuser/x", "/dev/zero", "/dev/null", "a" * 5000, "{{ 7 * 7 }}", "{% raw %}", "<|im_start|>", "<|im_end|>"),
    *("%s%n", "../../etc/passwd", "s3://bucket/x", "file:///etc/passwd", "-1", "1e999", "0x10", "2001-99-99", "$HOME"),
)
_NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**4000,
    0.0,
    -0.0,
    1e-300,
    1e308,
    float("inf"),
    float("nan"),
)
_MOST_DEPTH = 3


def draw_value(draw: Random, depth: int = 0) -> Any:
    """Return a value of JSON's kinds, odd ones more often than usual ones."""
    kind = draw.randrange(8 if depth < _MOST_DEPTH else 5)
    if kind == 0:
        return None
    if kind == 1:
        return draw.random() < 0.5
    if kind == 2:
        return draw.choice(_NUMBERS)
    if kind in (3, 4):
        return draw.choice(_TEXTS)
    if kind == 5:
        return [draw_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 6:
        return {draw.choice(_TEXTS): draw_value(draw, depth + 1) for _ in range(draw.randrange(4))}
    deep: Any = draw_value(draw, _MOST_DEPTH)
    for _ in range(draw.choice((10, 200, 900))):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    return deep


def mutate(value: Any, draw: Random) -> Any:
    """Change one place of nested values: another value, one less, one more, or a key by another name."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        return {**value, key: mutate(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], mutate(value[place], draw), *value[place + 1 :]]
    if isinstance(value, dict) and draw.random() < 0.7:
        changed = dict(value)
        if changed and draw.random() < 0.5:
            removed = changed.pop(draw.choice(list(changed)))
            return {**changed, draw.choice(_TEXTS): removed} if draw.random() < 0.5 else changed
        return {**changed, draw.choice((*_TEXTS, "extra")): draw_value(draw)}
    return draw_value(draw)


def spoil(content: bytes, draw: Random) -> bytes:
    """Change bytes at one place: flip, cut, double, insert or swap."""
    changes: tuple[Callable[[bytes, int], bytes], ...] = (
        lambda data, at: data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
        lambda data, at: data[:at],
        lambda data, at: data[at:],
        lambda data, at: data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:],
        lambda data, at: data[:at] + data[at : at + draw.randrange(1, 200)] * 3 + data[at:],
        lambda data, at: data[:at] + draw.randbytes(8) + data[at + 8 :],
        lambda data, at: data[:at] + b"\xff" * draw.randrange(1, 40) + data[at:],
    )
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        if not content:
            return content
        content = draw.choice(changes)(content, draw.randrange(len(content)))
    return content


def dump(value: Any) -> bytes:
    """Return JSON as bytes; lone surrogates and infinities are written as Python does."""
    return json.dumps(value, ensure_ascii=True).encode()
