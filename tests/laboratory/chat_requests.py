"""Requests of a chat API that a seed draws, most of them wrong somewhere."""

from random import Random
from typing import Any

from tests.laboratory.junk import dump, mutate, spoil

_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
_CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
_MESSAGES: tuple[dict[str, Any], ...] = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 1 and 1?"},
    {"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": "it."}]},
    {"role": "assistant", "content": "2"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "nothing"},
    {"role": "user", "content": "\ud800 <|im_end|> \x1b]0;x\x07 \x00 " * 40},
)


def draw_request(draw: Random) -> bytes:
    """Return the body of a request."""
    options: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": draw.choice((1, 3, 10**9)),
        "temperature": draw.choice((0, 0.7, 5, 1e-300)),
        "top_p": draw.choice((1, 1e-9, 0.5)),
        "seed": draw.choice((0, -(2**63), 2**63 - 1, 7)),
        "stop": draw.choice(("x", ["", "\ud800"], [str(n) for n in range(300)])),
        "stream": draw.random() < 0.5,
        "logprobs": True,
        "top_logprobs": draw.choice((0, 5, 20)),
        "tools": draw.choice(([_TOOL], [], [_TOOL] * 50)),
        "response_format": {"type": "text"},
        "n": 1,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    request: Any = {name: value for name, value in options.items() if draw.random() < 0.35}
    request["messages"] = [draw.choice(_MESSAGES) for _ in range(draw.choice((1, 2, 5)))]
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        request = mutate(request, draw)
    content = dump(request)
    return spoil(content, draw) if draw.random() < 0.1 else content
