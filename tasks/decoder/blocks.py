"""The differentiable pieces of a decoder layer around its attention, with their gradients written out.

Dimensions: `T` tokens, `H` hidden size, `I` intermediate size, `O` outputs of a group of projections, `R` its rank.

Gradients go to the input and to what is trained, which each block is given at its end: LoRA matrices beside frozen
weights, or the weights themselves. What is cheap to compute again is not kept: the activation of the gated layer is
made anew in the backward pass. A gradient is laid where the projection that made its tensor wants it (`source`, see
`projections`).

With dropout the masked copy of a projection's input is kept in the input's stead, or made anew. Each block keeps the
masks' key as well, so that autograd refuses a backward pass after the key has changed.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tasks.decoder.dropout import Dropout, MaskedTensor
from tasks.decoder.elementwise import Heads, Quantized
from tasks.decoder.norms import Norm
from tasks.decoder.projections import AnyProjection
from tasks.decoder.rooms import keep_rows

_state = threading.local()


@contextmanager
def last_output_unused() -> Iterator[None]:
    """Let `GatedProject` and the routed experts leave their output unset, for a layer that runs again."""
    _state.is_unused = True
    try:
        yield
    finally:
        _state.is_unused = False


@contextmanager
def output_wanted() -> Iterator[None]:
    """Have an output set in any case: something is done with it."""
    before, _state.is_unused = is_last_output_unused(), False
    try:
        yield
    finally:
        _state.is_unused = before


def is_last_output_unused() -> bool:
    """Say whether the layer's last output is not wanted."""
    return getattr(_state, "is_unused", False)


class NormProject(torch.autograd.Function):
    """(residual, delta) -> (residual + delta, projection(norm(residual + delta)))."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        delta: Tensor | None,
        source: AnyProjection | None,
        norm: Norm,
        projection: AnyProjection,
        ops: ModuleType,
        dropout: Dropout | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = projection.allocate_input(residual.shape[0], drops=dropout is not None)
        dropped = _mask(inputs.dropped, projection, dropout)
        total, rstd = ops.add_norm(residual, delta, norm.weight, norm.eps, inputs.values, inputs.quantized, dropped)
        outputs = projection.forward(inputs)
        # Without its masked copy x~ is kept whole; with it, the rest of x~ is let go.
        projected = inputs.projected if dropped is None else keep_rows(inputs.projected)
        ctx.save_for_backward(total, rstd, inputs.adapted, projected, _key(dropout))
        ctx.settings = source, norm, projection, ops, dropout
        ctx.has_delta = delta is not None
        return total, outputs

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor | None, grad: Tensor) -> tuple[Any, ...]:
        total, rstd, adapted, projected, _ = ctx.saved_tensors
        source, norm, projection, ops, dropout = ctx.settings
        goes_on = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        needs_input = goes_on or bool(norm.parameters)
        small, input_grad, side = projection.backward(grad, needs_input=needs_input, drops=dropout is not None)
        trained = projection.adapters.compute_grads(grad, small, adapted, projected)
        if input_grad is None:
            return None, None, None, None, None, None, None, *trained
        trained += norm.compute_grads(ops, input_grad, total, rstd)
        if not goes_on:
            return None, None, None, None, None, None, None, *trained
        result, quantized = _allocate_grad(source, total)
        masked = _mask(side, projection, dropout)
        ops.norm_backward(input_grad, total, rstd, norm.weight, total_grad, result, quantized, masked)
        return result, result if ctx.has_delta else None, None, None, None, None, None, *trained


class OutputNorm(torch.autograd.Function):
    """Norm of a layer's output before it joins the stream (Gemma)."""

    @staticmethod
    def forward(
        ctx: Any, delta: Tensor, source: AnyProjection | None, norm: Norm, ops: ModuleType, *parameters: Tensor
    ) -> Tensor:
        out = torch.empty_like(delta)
        _, rstd = ops.add_norm(delta, None, norm.weight, norm.eps, out)
        ctx.save_for_backward(delta, rstd)
        ctx.settings = source, norm, ops
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        delta, rstd = ctx.saved_tensors
        source, norm, ops = ctx.settings
        trained = norm.compute_grads(ops, grad, delta, rstd)
        result, quantized = _allocate_grad(source, delta)
        ops.norm_backward(grad, delta, rstd, norm.weight, None, result, quantized)
        return result, None, None, None, *trained


class Rotate(torch.autograd.Function):
    """[T, heads * D] -> rotated queries and keys, and values, [T, heads, D] each."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        source: AnyProjection | None,
        heads: Heads,
        cos: Tensor,
        sin: Tensor,
        norms: tuple[Norm | None, Norm | None],
        ops: ModuleType,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = tuple(None if norm is None else norm.weight for norm in norms)
        eps = next((norm.eps for norm in norms if norm is not None), 0.0)
        has_norms = any(weight is not None for weight in weights)
        ctx.save_for_backward(cos, sin, *([qkv] if has_norms else []))
        ctx.settings = source, heads, norms, weights, eps, ops
        result: tuple[Tensor, Tensor, Tensor] = ops.rotate(qkv, heads, cos, sin, *weights, eps)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cos, sin, *rest = ctx.saved_tensors
        source, heads, norms, weights, eps, ops = ctx.settings
        num_tokens, width = grads[0].shape[0], (heads.num_query + 2 * heads.num_key_value) * heads.size
        if source is None:
            result = grads[0].new_empty(num_tokens, width)
        else:
            result = source.allocate_grad(num_tokens)[0]
            source.forget_grad()  # too little work for a float8 copy on the way: the projection makes its own
        learns = any(norm is not None and norm.parameters for norm in norms)
        sums = ops.rotate_backward(
            grads, rest[0] if rest else None, heads, cos, sin, *weights, eps, result, with_weights=learns
        )
        trained = [norm.give(total) for norm, total in zip(norms, sums, strict=True) if norm and norm.parameters]
        return result, None, None, None, None, None, None, *trained


class Project(torch.autograd.Function):
    """X -> projection(x)."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        projection: AnyProjection,
        ops: ModuleType,
        dropout: Dropout | None,
        *parameters: Tensor,
    ) -> Tensor:
        inputs = projection.allocate_input(values.shape[0], drops=dropout is not None)
        dropped = _mask(inputs.dropped, projection, dropout)
        if dropped is not None:
            ops.drop(values, dropped)
        outputs = projection.forward_values(values, inputs)
        # The attention keeps its output too: only the small product is kept apart from it.
        ctx.save_for_backward(values, keep_rows(inputs.projected), _key(dropout))
        ctx.settings = projection, ops, dropout
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        adapted, projected, _ = ctx.saved_tensors
        projection, ops, dropout = ctx.settings
        small, input_grad, side = projection.backward(
            grad, needs_input=ctx.needs_input_grad[0] or dropout is not None, drops=dropout is not None
        )
        masked = _mask(side, projection, dropout)
        if masked is not None:
            ops.drop_backward(input_grad, adapted, masked)
            adapted = masked.values
        trained = projection.adapters.compute_grads(grad, small, adapted, projected)
        return input_grad, None, None, None, *trained


class GatedProject(torch.autograd.Function):
    """[T, 2 I] -> projection(activation(left half) * right half)."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        source: AnyProjection,
        activation: str,
        projection: AnyProjection,
        ops: ModuleType,
        dropout: Dropout | None,
        *parameters: Tensor,
    ) -> Tensor:
        inputs = projection.allocate_input(gate_up.shape[0], drops=dropout is not None)
        dropped = _mask(inputs.dropped, projection, dropout)
        if is_last_output_unused():
            ops.gate(gate_up, activation, inputs.values, None, dropped)
            projection.project_small(inputs)
            outputs = gate_up.new_empty(gate_up.shape[0], projection.adapters.joint_b.shape[0])
        else:
            ops.gate(gate_up, activation, inputs.values, inputs.quantized, dropped)
            outputs = projection.forward(inputs)
        ctx.save_for_backward(gate_up, keep_rows(inputs.projected), _key(dropout))
        ctx.settings = source, activation, projection, ops, dropout
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gate_up, projected, _ = ctx.saved_tensors
        source, activation, projection, ops, dropout = ctx.settings
        small, values, side = projection.backward(grad, needs_input=True, drops=dropout is not None)
        result, quantized = _allocate_grad(source, gate_up)
        ops.gate_backward(values, gate_up, activation, result, quantized, _mask(side, projection, dropout))
        # values now holds what the adapter was given, made anew.
        trained = projection.adapters.compute_grads(grad, small, values, projected)
        return result, None, None, None, None, None, *trained


class Select(torch.autograd.Function):
    """Rows of two tensors [T, …] at distinct positions [N]: nothing else of the last layer is read."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(positions)
        ctx.num_tokens = first.shape[0]
        return first.index_select(0, positions), second.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (positions,) = ctx.saved_tensors
        spread = (grad.new_zeros(ctx.num_tokens, grad.shape[1]).index_copy_(0, positions, grad) for grad in grads)
        return *spread, None


def _mask(values: Tensor | None, projection: AnyProjection, dropout: Dropout | None) -> MaskedTensor | None:
    """Return a tensor together with the projection's mask; None where there is nothing to mask."""
    return None if values is None or dropout is None else MaskedTensor(values, dropout.mask(projection.site))


def _key(dropout: Dropout | None) -> Tensor | None:
    return None if dropout is None else dropout.key


def _allocate_grad(source: AnyProjection | None, like: Tensor) -> tuple[Tensor, Quantized | None]:
    """Return room for the gradient of a tensor [T, width], where the projection that made the tensor wants it."""
    return (torch.empty_like(like), None) if source is None else source.allocate_grad(like.shape[0])
