"""Routed experts of a decoder layer: each token goes through a few of them, and their outputs are added, weighted.

Dimensions: `T` tokens, `H` hidden size, `I` intermediate size, `K` experts a token, `S` = T K rows ordered by expert,
`E` experts, `C` further columns (see `grouped`).

The router is the family's own module, and its gradient autograd's. Everything after it is one differentiable piece: the
rows are gathered, multiplied and summed without a copy of any weight. A row's weight goes into its gated values, before
the last product, so that the experts' outputs are not needed again in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.decoder import expert_elementwise
from tasks.decoder.blocks import is_last_output_unused
from tasks.decoder.expert_elementwise import Gate
from tasks.decoder.grouped import AnyGrouped, ExpertAdapters
from tasks.decoder.norms import Norm
from tasks.decoder.projections import AnyProjection

Routed = tuple[Tensor, Tensor, Tensor]
Route = Callable[[Tensor], Routed]


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer."""

    route: Route
    """[T, H] -> logits, weights [T, K] and experts [T, K]"""
    gate_up: AnyGrouped
    gate: Gate
    down: AnyGrouped
    num_chosen: int
    """K"""
    shared_gate: Callable[[Tensor], Tensor] | None = None
    """[T, H] -> [T, 1], whose sigmoid weighs what the shared experts give."""

    @property
    def adapters(self) -> tuple[ExpertAdapters, ExpertAdapters]:
        """Of both products."""
        return self.gate_up.adapters, self.down.adapters

    @property
    def num_weights(self) -> int:
        """Weights that a token meets."""
        projections = (self.gate_up, self.down)
        return self.num_chosen * sum(projection.num_in * projection.num_out for projection in projections)


class Order(NamedTuple):
    """Where the rows of a batch come from."""

    places: Tensor
    """[T, K]: of each token's rows."""
    pairs: Tensor
    """[S]: which of the T K pairs of a token and an expert a row is."""
    tokens: Tensor
    """[S]"""
    ends: Tensor
    """[E] int32: where each expert's rows end."""


def sort_rows(chosen: Tensor, num_experts: int) -> Order:
    """Order all pairs of a token and an expert by expert, and by token within it; nothing waits for the device.

    Args:
        chosen: [T, K], the experts of each token.
        num_experts: E.
    """
    # A sort on a GPU takes a pass a byte of its keys: numbers of experts are as narrow as they can be.
    narrow = torch.uint8 if num_experts <= 256 else torch.int16 if num_experts <= 1 << 15 else torch.int32
    ids, pairs = torch.sort(chosen.reshape(-1).to(narrow), stable=True)
    places = torch.empty_like(pairs).scatter_(0, pairs, torch.arange(len(pairs), device=pairs.device))
    numbers = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, numbers, side="right", out_int32=True)
    return Order(places.view(chosen.shape), pairs, pairs // chosen.shape[1], ends)


def run_experts(layer: ExpertLayer, hidden: Tensor, ops: ModuleType, *, routed_by: Tensor | None = None) -> Tensor:
    """Return what the routed experts add to the stream [T, H].

    Args:
        layer: its parts.
        hidden: [T, H], normed.
        ops: of the decoder.
        routed_by: [T, H]: what the router sees, where it is something else.
    """
    _, weights, chosen = layer.route(hidden if routed_by is None else routed_by)
    order = sort_rows(chosen, layer.gate_up.num_experts)
    parameters = [parameter for adapters in layer.adapters for parameter in adapters.parameters]
    result: Tensor = RouteRows.apply(hidden, weights, order, layer, choose_expert_operations(ops), *parameters)
    return result


def choose_expert_operations(ops: ModuleType) -> ModuleType:
    """Return what goes with the decoder's operations: Triton kernels or plain PyTorch."""
    if ops.__name__.endswith(".kernels"):
        from tasks.decoder import expert_kernels

        return expert_kernels
    return expert_elementwise


class RouteRows(torch.autograd.Function):
    """([T, H], weights [T, K]) -> the weighted sum of the chosen experts' outputs [T, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        order: Order,
        layer: ExpertLayer,
        ops: ModuleType,
        *parameters: Tensor,
    ) -> Tensor:
        num_rows = len(order.tokens)
        row_weights = weights.reshape(-1).index_select(0, order.pairs)
        gate_up, small = layer.gate_up.forward_tokens(hidden, order.tokens, order.ends, ops)
        rows = layer.down.allocate_input(num_rows, order.ends)
        ops.gate_weighted(gate_up, row_weights, layer.gate, rows.values, rows.float8)
        down_small = layer.down.project_small(rows, order.ends, row_weights)
        if is_last_output_unused():
            result = torch.empty_like(hidden)
        else:
            result = ops.sum_rows(layer.down.forward(rows, down_small, order.ends), order.places)
        ctx.save_for_backward(hidden, gate_up, small, down_small, row_weights, *order)
        ctx.settings = layer, ops, weights.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, gate_up, small, down_small, row_weights, *rest = ctx.saved_tensors
        layer, ops, dtype = ctx.settings
        order, num_rows, grad = Order(*rest), len(row_weights), grad.contiguous()
        small_grad, values = layer.down.backward_tokens(grad, order.tokens, order.ends, ops)
        rows = layer.gate_up.allocate_grad(num_rows, order.ends)
        weight_grad = ops.gate_weighted_backward(values, gate_up, row_weights, layer.gate, rows.values, rows.float8)
        if layer.down.has_bias:
            weight_grad = weight_grad + small_grad[:, layer.down.adapters.rank]
        trained: list[Tensor | None] = []
        if rank := layer.down.adapters.rank:
            # values now holds what the last product was given, made anew.
            of_a = ops.multiply_outer(small_grad[:, :rank], values, order.ends)
            of_b = ops.multiply_outer(down_small[:, :rank], grad, order.ends, order.tokens)
            trained = layer.down.adapters.give(of_a, of_b)
        del values
        small_grad, input_rows = layer.gate_up.backward(rows, order.ends, needs_input=ctx.needs_input_grad[0])
        if rank := layer.gate_up.adapters.rank:
            of_a = ops.multiply_outer(small_grad[:, :rank], hidden, order.ends, order.tokens)
            of_b = ops.multiply_outer(small[:, :rank], rows.values, order.ends)
            trained = layer.gate_up.adapters.give(of_a, of_b) + trained
        hidden_grad = None if input_rows is None else ops.sum_rows(input_rows, order.places)
        pair_grads = None
        if ctx.needs_input_grad[1]:
            pair_grads = weight_grad.index_select(0, order.places.flatten()).view(order.places.shape).to(dtype)
        return hidden_grad, pair_grads, None, None, None, *trained


class AddNorm(torch.autograd.Function):
    """(residual, delta) -> (residual + delta, norm(residual + delta))."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, delta: Tensor | None, source: AnyProjection | None, norm: Norm, ops: ModuleType
    ) -> tuple[Tensor, Tensor]:
        normed = torch.empty_like(residual, memory_format=torch.contiguous_format)
        total, rstd = ops.add_norm(residual, delta, norm.weight, norm.eps, normed)
        ctx.save_for_backward(total, rstd)
        ctx.settings = source, norm, ops, delta is not None
        return total, normed

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor | None, grad: Tensor) -> tuple[Any, ...]:
        total, rstd = ctx.saved_tensors
        source, norm, ops, has_delta = ctx.settings
        result = torch.empty_like(total) if source is None else source.allocate_grad(total.shape[0])[0]
        ops.norm_backward(grad.contiguous(), total, rstd, norm.weight, total_grad, result)
        if source is not None:
            source.forget_grad()
        return result, result if has_delta else None, None, None, None
