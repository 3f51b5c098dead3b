"""Attention whose queries, keys and values come through narrow latents (DeepSeek-AI, 2024: MLA).

Dimensions: `T` tokens of a flat batch (examples end to end), `N` heads, `R` columns of a head that are rotated, `V` of
its values.

The joint product of the layer's first group has the queries or their latent, the latent of keys and values, and R
columns that the keys of all heads have in common. Each latent is normed, and goes through a product of its own.
"""

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tasks.decoder import elementwise, latent_elementwise
from tasks.decoder.blocks import NormProject
from tasks.decoder.forward import Forward
from tasks.decoder.latent_elementwise import LatentHeads
from tasks.decoder.norms import Norm
from tasks.decoder.projections import AnyProjection

Latent = tuple[Norm, AnyProjection]
"""What a latent goes through."""


@dataclass(frozen=True)
class LatentAttention:
    """Latent attention."""

    heads: LatentHeads
    query: Latent | None
    """None: the joint product has the queries themselves."""
    key_value: Latent
    rope: str
    scale: float

    @property
    def projections(self) -> tuple[AnyProjection, ...]:
        """All groups of linear layers beside the layer's own."""
        return tuple(latent[1] for latent in (self.query, self.key_value) if latent is not None)


def attend_latent(mixer: LatentAttention, rows: Tensor, source: AnyProjection, forward: Forward) -> Tensor:
    """Return [T, N V] of the joint product [T, O]."""
    cos, sin = forward.angles[mixer.rope]
    rank = len(mixer.key_value[0].weight)
    queries, latent, rotated = SplitLatents.apply(rows, source, rank, mixer.heads.rotated)
    query_source = None
    if mixer.query is not None:
        query_source = mixer.query[1]
        queries = _project(queries, mixer.query, forward)
    keys_values = _project(latent, mixer.key_value, forward)
    sources = query_source, mixer.key_value[1]
    ops = find_latent_operations(forward.ops)
    queries, keys, values = JoinHeads.apply(queries, keys_values, rotated, sources, mixer.heads, cos, sin, ops)
    attended = forward.attend(queries, keys, values, forward.segments, scale=mixer.scale, window=None)
    return attended[..., : mixer.heads.value].flatten(1)


def _project(values: Tensor, latent: Latent, forward: Forward) -> Tensor:
    """Return what comes of a latent [T, rank]."""
    norm, projection = latent
    parameters = projection.adapters.parameters
    settings = norm, projection, forward.ops, forward.dropout
    _, result = NormProject.apply(values, None, None, *settings, *parameters)
    projected: Tensor = result
    return projected


class SplitLatents(torch.autograd.Function):
    """[T, O] -> queries or their latent, the latent of keys and values [T, rank], and what is rotated [T, R]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, source: AnyProjection, rank: int, rotated: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.source, ctx.sizes = source, (rows.shape[1] - rank - rotated, rank, rotated)
        first, second, third = (part.contiguous() for part in rows.split(ctx.sizes, dim=1))
        return first, second, third

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        result = ctx.source.allocate_grad(grads[0].shape[0])[0]
        ctx.source.forget_grad()
        for part, grad in zip(result.split(ctx.sizes, dim=1), grads, strict=True):
            part.copy_(grad)
        return result, None, None, None


class JoinHeads(torch.autograd.Function):
    """See `latent_elementwise.join_heads`."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys_values: Tensor,
        rotated: Tensor,
        sources: tuple[AnyProjection | None, AnyProjection],
        heads: LatentHeads,
        cos: Tensor,
        sin: Tensor,
        ops: ModuleType,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.settings = sources, heads, ops
        result: tuple[Tensor, Tensor, Tensor] = ops.join_heads(queries, keys_values, rotated, cos, sin, heads)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        (query_source, source), heads, ops = ctx.settings
        num_tokens = grads[0].shape[0]
        to_keys_values = source.allocate_grad(num_tokens)[0]
        source.forget_grad()
        if query_source is None:
            to_queries = grads[0].new_empty(num_tokens, heads.num * heads.size)
        else:
            to_queries = query_source.allocate_grad(num_tokens)[0]
            query_source.forget_grad()
        of_rotated = ops.join_heads_backward(grads, cos, sin, heads, to_queries, to_keys_values)
        return to_queries, to_keys_values, of_rotated, None, None, None, None, None


@cache
def find_latent_operations(ops: ModuleType) -> ModuleType:
    """Return the operations that go with the layers' `elementwise` or `kernels`."""
    if ops is elementwise:
        return latent_elementwise
    from tasks.decoder import latent_kernels

    return latent_kernels
