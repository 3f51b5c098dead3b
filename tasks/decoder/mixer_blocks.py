"""Differentiable pieces of mixers that some families have and Llama's attention has not.

Dimensions: `T` tokens, `D` head size, `O` outputs of a group of projections.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.decoder.norms import Norm
from tasks.decoder.projections import AnyProjection

Columns = slice | Tensor
"""Of a joint product: side by side, or their numbers."""


class HeadLayout(NamedTuple):
    """Layout of a row of heads of size each: the queries', then the keys', then the values'."""

    num_query: int
    num_key_value: int
    """0 where the layer attends to another layer's keys and values."""
    size: int
    has_gates: bool = False
    """Each query head is followed by the gate of what it attends to."""
    values_are_keys: bool = False
    """There are no columns of values: they are made of the keys'."""

    def locate(self, row: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """View rows [T, O] as queries, gates, keys and values [T, heads, D] each."""
        step = self.num_query * (2 if self.has_gates else 1)
        heads = row.unflatten(-1, (-1, self.size))
        queries = heads[:, :step]
        gates = None
        if self.has_gates:
            queries, gates = heads[:, 0:step:2], heads[:, 1:step:2]
        keys = heads[:, step : step + self.num_key_value]
        return queries, gates, keys, keys if self.values_are_keys else heads[:, step + self.num_key_value :]


class SplitHeads(torch.autograd.Function):
    """[T, O] -> queries [T, heads, D] and, where there are, gates, keys and values; normed, and rotated by angles."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        source: AnyProjection,
        layout: HeadLayout,
        cos: Tensor,
        sin: Tensor,
        norms: tuple[Norm | None, Norm | None, Norm | None],
        ops: ModuleType,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Take the norms of queries, keys and values; values are not rotated."""
        ctx.save_for_backward(cos, sin, *([rows] if any(norms) else []))
        ctx.settings = source, layout, norms, ops
        queries, gates, keys, values = layout.locate(rows)
        first = _turn(ops, queries, norms[0], cos, sin)
        copied = None if gates is None else gates.contiguous()
        if not layout.num_key_value:
            return first, copied, None, None
        return first, copied, _turn(ops, keys, norms[1], cos, sin), _turn(ops, values, norms[2], cos[:, :0], sin[:, :0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        cos, sin, *rest = ctx.saved_tensors
        source, layout, norms, ops = ctx.settings
        first = grads[0]
        assert first is not None
        result = source.allocate_grad(first.shape[0])[0]
        source.forget_grad()
        places = layout.locate(result)
        before = layout.locate(rest[0]) if rest else (None,) * 4
        _turn_back(ops, first, before[0], norms[0], cos, sin, places[0])
        if places[1] is not None:
            places[1].copy_(grads[1])
        if layout.num_key_value:
            _turn_back(ops, grads[2], before[2], norms[1], cos, sin, places[2])
            adds = layout.values_are_keys
            _turn_back(ops, grads[3], before[3], norms[2], cos[:, :0], sin[:, :0], places[3], adds=adds)
        return result, None, None, None, None, None, None


def _turn(ops: ModuleType, states: Tensor, norm: Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    result: Tensor = ops.turn_heads(states, weight, eps, cos, sin)
    return result


def _turn_back(
    ops: ModuleType,
    grad: Tensor | None,
    states: Tensor | None,
    norm: Norm | None,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    *,
    adds: bool = False,
) -> None:
    if grad is None:  # nobody read it
        if not adds:
            out.zero_()
        return
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    ops.turn_heads_backward(grad, states, weight, eps, cos, sin, out, adds=adds)


class DeltaLayout(NamedTuple):
    """Where the parts of a DeltaNet's joint product [T, O] lie."""

    num_key: int
    """Heads of queries, and of keys."""
    num_value: int
    key_size: int
    value_size: int
    convolved: tuple[Tensor, Tensor, Tensor]
    """Columns (int32) of queries, keys and values."""
    gates: Columns
    beta: Columns
    decay: Columns


class SplitDelta(torch.autograd.Function):
    """[T, O] -> convolved queries, keys and values [T, heads, D], gates [T, heads, D], beta and decay [T, heads]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        source: AnyProjection | None,
        layout: DeltaLayout,
        weights: tuple[Tensor, Tensor, Tensor],
        positions: Tensor,
        ops: ModuleType,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows, positions)
        ctx.settings = source, layout, weights, ops
        sizes = layout.key_size, layout.key_size, layout.value_size
        heads = (
            ops.convolve(rows, columns, weight, positions).unflatten(-1, (-1, size))
            for columns, weight, size in zip(layout.convolved, weights, sizes, strict=True)
        )
        gates = rows[:, layout.gates].contiguous().unflatten(-1, (-1, layout.value_size))
        return *heads, gates, rows[:, layout.beta].contiguous(), rows[:, layout.decay].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, positions = ctx.saved_tensors
        source, layout, weights, ops = ctx.settings
        result = torch.empty_like(rows) if source is None else source.allocate_grad(rows.shape[0])[0]
        if source is not None:
            source.forget_grad()
        for grad, columns, weight in zip(grads, layout.convolved, weights, strict=False):
            ops.convolve_backward(grad.flatten(1), rows, columns, weight, positions, result)
        result[:, layout.gates] = grads[3].flatten(1)
        result[:, layout.beta] = grads[4]
        result[:, layout.decay] = grads[5]
        return result, None, None, None, None, None


class GateNorm(torch.autograd.Function):
    """(values, gates) [T, heads, D] -> norm(values) * silu(gates), [T, heads * D]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gates: Tensor, norm: Norm, ops: ModuleType) -> Tensor:
        ctx.save_for_backward(values, gates)
        ctx.settings = norm, ops
        result: Tensor = ops.gate_norm(values, gates, norm.weight, norm.eps)
        return result.flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values, gates = ctx.saved_tensors
        norm, ops = ctx.settings
        return *ops.gate_norm_backward(grad.view_as(values), values, gates, norm.weight, norm.eps), None, None
