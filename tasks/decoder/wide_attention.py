"""Causal attention with heads that are too large for FlashAttention: PyTorch's own for batches of like segments.

Dimensions: `T` tokens of all segments, `P` places of all batches, `D` head size.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder.attention import Segments, attend_one_by_one

# A segment joins a batch whose longest one is at most this many times as long.
_LIKE = 1.3
_ROUNDED = 8


class Batches(NamedTuple):
    """Where the tokens go, segments of like length side by side, filled up on the right."""

    shapes: tuple[tuple[int, int], ...]
    """Segments and places of each batch."""
    places: Tensor
    """[P] token of each place; any where there is none."""
    found: Tensor
    """[T] place of each token."""


def attend_wide(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, *, scale: float, window: int | None
) -> Tensor:
    """Attend as `attention.Attention` says; no token sees what fills its segment up, which comes after it."""
    if not queries.is_cuda or window is not None:
        return attend_one_by_one(queries, keys, values, segments, scale=scale, window=window)
    return attend_in_batches(queries, keys, values, form_batches(segments.lengths, queries.device), scale=scale)


def attend_in_batches(queries: Tensor, keys: Tensor, values: Tensor, batches: Batches, *, scale: float) -> Tensor:
    """Attend batch by batch; [T, heads, D] as the queries."""
    repeats = queries.shape[1] // keys.shape[1]
    sizes = [rows * length for rows, length in batches.shapes]
    spread = [_FillUp.apply(states, batches.places, batches.found).split(sizes) for states in (queries, keys, values)]
    results = []
    for shape, *states in zip(batches.shapes, *spread, strict=True):
        query, key, value = (part.unflatten(0, shape).transpose(1, 2) for part in states)
        if repeats > 1:
            key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        results.append(attended.transpose(1, 2).flatten(0, 1))
    collected: Tensor = _Collect.apply(torch.cat(results), batches.places, batches.found)
    return collected


@lru_cache(maxsize=4)
def form_batches(lengths: tuple[int, ...], device: torch.device) -> Batches:
    """Put segments of like length together."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    order = sorted((number for number, length in enumerate(lengths) if length), key=lambda n: (-lengths[n], n))
    shapes: list[tuple[int, int]] = []
    places: list[Tensor] = []
    found = torch.empty(sum(lengths), dtype=torch.int64)
    begin, end = 0, 0
    while begin < len(order):
        longest = -(-lengths[order[begin]] // _ROUNDED) * _ROUNDED
        chosen = [number for number in order[begin:] if lengths[number] * _LIKE + _ROUNDED >= longest]
        for number in chosen:
            length, start = lengths[number], starts[number]
            tokens = torch.arange(longest).clamp(max=length - 1) + start
            places.append(tokens)
            found[start : start + length] = torch.arange(end, end + length)
            end += longest
        shapes.append((len(chosen), longest))
        begin += len(chosen)
    return Batches(tuple(shapes), torch.cat(places).to(device), found.to(device))


class _FillUp(torch.autograd.Function):
    """[T, …] -> [P, …]; what comes back at a place that no token has is not read."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor, found: Tensor) -> Tensor:
        ctx.save_for_backward(found)
        return states.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """[P, …] -> [T, …], the tokens alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor, found: Tensor) -> Tensor:
        ctx.save_for_backward(found)
        ctx.num_places = len(places)
        return states.index_select(0, found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (found,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_places, *grad.shape[1:]).index_copy_(0, found, grad), None, None
