"""Causal attention with heads that are too large for FlashAttention, for batches of like segments.

Segments of up to 4,096 tokens have their scores as matrices, which two products of full speed and a softmax take: with
heads of 512, PyTorch's own fused attention needs four times as long there (measured on an H200). Longer ones go through
that.

Dimensions: `T` tokens of all segments, `P` places of all batches, `N` segments of a batch and `L` its places, `D` head
size, `R` query heads to a key head, `B` = N times key heads.
"""

from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder import causal_softmax
from tasks.decoder.attention import Segments, attend_one_by_one

# A segment joins a batch whose longest one is at most this many times as long.
_LIKE = 1.5
_ROUNDED = 8
# Scores of one segment take 64 MB a query head at this length.
_LONGEST = 4096
_SCORE_BYTES = 1 << 28


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
    sizes = [rows * length for rows, length in batches.shapes]
    spread = [_FillUp.apply(states, batches.places, batches.found).split(sizes) for states in (queries, keys, values)]
    results = []
    for shape, *states in zip(batches.shapes, *spread, strict=True):
        query, key, value = (part.unflatten(0, shape) for part in states)
        attend = _attend_by_scores if shape[1] <= _LONGEST else _attend_fused
        results.append(attend(query, key, value, scale).flatten(0, 1))
    collected: Tensor = _Collect.apply(torch.cat(results), batches.places, batches.found)
    return collected


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend through PyTorch's own; all are [N, L, heads, D]."""
    repeats = query.shape[2] // key.shape[2]
    states = (part.repeat_interleave(repeats, dim=2) if repeats > 1 else part for part in (key, value))
    query, key, value = (part.transpose(1, 2) for part in (query, *states))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)


def _attend_by_scores(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend with scores that exist; all are [N, L, heads, D]."""
    num_rows, length, num_keys = key.shape[:3]
    queries = query.unflatten(2, (num_keys, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)  # [B, R L, D]
    keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (key, value))  # [B, L, D]
    at_once = max(1, _SCORE_BYTES // (queries.shape[1] * length * 4))
    parts = zip(*(states.split(at_once) for states in (queries, keys, values)), strict=True)
    attended = torch.cat([_ByScores.apply(*states, scale) for states in parts])
    return attended.unflatten(0, (num_rows, num_keys)).unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _ByScores(torch.autograd.Function):
    """Queries [B, R L, D], keys and values [B, L, D] -> [B, R L, D]; the scores are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        softmax = _find_softmax(queries.device.type)
        scores = _multiply(queries, keys.mT)
        probabilities, log_sums = softmax.causal_softmax(scores, scale, queries.dtype)
        out = torch.bmm(probabilities, values)
        ctx.save_for_backward(queries, keys, values, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        queries, keys, values, out, log_sums = ctx.saved_tensors
        softmax = _find_softmax(queries.device.type)
        deltas = (out.to(log_sums.dtype) * grad).sum(-1)
        scores, grads = _multiply(queries, keys.mT), _multiply(grad, values.mT)
        probabilities, score_grads = softmax.causal_softmax_backward(
            scores, grads, log_sums, deltas, ctx.scale, queries.dtype
        )
        return (
            torch.bmm(score_grads, keys),
            torch.bmm(score_grads.mT, queries),
            torch.bmm(probabilities.mT, grad),
            None,
        )


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply batches of matrices, with an fp32 result of 16-bit factors."""
    if left.dtype in (torch.float32, torch.float64):
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


@cache
def _find_softmax(device: str) -> ModuleType:
    """Return the Triton kernels on a GPU that has Triton, else plain PyTorch."""
    if device == "cuda":
        try:
            from tasks.decoder import causal_softmax_kernels
        except ImportError:
            return causal_softmax
        return causal_softmax_kernels
    return causal_softmax


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
