"""One answer, piece by piece as it is made: greedy, or drawn with a temperature."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.evaluation.generation import context_length, decode
from tasks.evaluation.padded import forward, pad_left

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the bytes of a character may come in several tokens


@torch.inference_mode()
def stream_tokens(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Give the tokens of an answer, without the stop id; temperature 0 takes the most likely one each time.

    Ends at a stop id, after `max_new_tokens`, or where the model's context ends. The generator, on the CPU, makes a
    drawn answer repeatable.
    """
    room = min(max_new_tokens, context_length(model) - len(prompt))
    input_ids, mask, positions = pad_left([prompt], model.device)
    cache: Any = None
    for _ in range(room):
        logits, cache = forward(model, input_ids, mask, positions, cache=cache, use_cache=True, keep=1)
        token = _choose(logits[0, -1], temperature, generator)
        if token in stop_ids:
            return
        yield token
        input_ids = torch.tensor([[token]], device=model.device)
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        positions = positions[:, -1:] + 1


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial(find_chances(logits, temperature), 1, generator=generator))


def find_chances(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the softmax of logits [V] at a temperature above 0, on the CPU; however small it is, the sum is 1."""
    scaled = logits.float().cpu()
    # From the largest on, so that nothing overflows; below the least normal number the divisor would be 0.
    return torch.softmax((scaled - scaled.max()) / max(temperature, torch.finfo(torch.float32).tiny), dim=-1)


def stream_text(tokens: Iterator[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Give the text of tokens as it grows; the pieces together are the decoded whole."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = decode(tokenizer, ids)
        if text.endswith(_UNFINISHED) or not text.startswith(shown):
            continue
        yield text[len(shown) :]
        shown = text
    rest = decode(tokenizer, ids)
    if rest.startswith(shown) and len(rest) > len(shown):
        yield rest[len(shown) :]
