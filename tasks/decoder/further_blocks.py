"""Differentiable pieces of a decoder layer that some families have and Llama's has not.

Dimensions: `T` tokens, `H` hidden size, `D` head size.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tasks.decoder.elementwise import Heads
from tasks.decoder.norms import Norm
from tasks.decoder.projections import AnyProjection
from tasks.decoder.rooms import copy_rows


class RowNorms(torch.autograd.Function):
    """Norm all query heads of a token together, and all its key heads (OLMo 2); [T, heads * D] to the same."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        source: AnyProjection,
        heads: Heads,
        norms: tuple[Norm, Norm],
        ops: ModuleType,
        *parameters: Tensor,
    ) -> Tensor:
        out = torch.empty_like(qkv)
        roots = []
        for part, norm in zip(_locate(heads), norms, strict=True):
            roots.append(ops.add_norm(qkv[:, part], None, norm.weight, norm.eps, out[:, part])[1])
        values = slice(_locate(heads)[1].stop, None)
        copy_rows(qkv[:, values], out[:, values])
        ctx.save_for_backward(qkv, *roots)
        ctx.settings = source, heads, norms, ops
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        qkv, *roots = ctx.saved_tensors
        source, heads, norms, ops = ctx.settings
        result = source.allocate_grad(grad.shape[0])[0]
        trained: list[Tensor | None] = []
        for part, norm, rstd in zip(_locate(heads), norms, roots, strict=True):
            trained += norm.compute_grads(ops, grad[:, part], qkv[:, part], rstd)
            ops.norm_backward(grad[:, part], qkv[:, part], rstd, norm.weight, None, result[:, part])
        values = slice(_locate(heads)[1].stop, None)
        copy_rows(grad[:, values], result[:, values])
        source.forget_grad()
        return result, None, None, None, None, *trained


class Scale(torch.autograd.Function):
    """Multiply what a projection gave [T, H] with a number, before it joins the stream (Granite)."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, source: AnyProjection, factor: float) -> Tensor:
        ctx.settings = source, factor
        return delta * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        source, factor = ctx.settings
        result = source.allocate_grad(grad.shape[0])[0]
        torch.mul(grad, factor, out=result)
        source.forget_grad()
        return result, None, None


def _locate(heads: Heads) -> tuple[slice, slice]:
    """Return the columns of the queries and of the keys."""
    first = heads.num_query * heads.size
    return slice(0, first), slice(first, first + heads.num_key_value * heads.size)
