"""Routed experts with LoRA as two thin products beside the frozen ones, in place of a second copy of their weights.

PEFT adapts an experts' parameter [E, outputs, inputs] by adding B A to it before each forward pass: a copy of all
experts' weights, which the backward pass keeps. Here x W' + (x A') B' is computed for the rows of each expert, through
grouped products, with PEFT's own matrices: an adapter that is trained here is PEFT's.

Dimensions: `T` tokens, `K` experts a token, `S` = T K rows ordered by expert, `E` experts, `R` rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from tasks.decoder.grouped_products import multiply_grouped

# What transformers' decorator `use_experts_implementation` leaves on a module of experts, and the modules bring along.
_MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts", "_apply_gate")


def use_factored_adapters(model: nn.Module) -> Callable[[], None] | None:
    """Compute the adapters of all routed experts beside the frozen products; return what undoes it.

    None: the model has no adapted experts, or their modules are not made as transformers makes them.
    """
    outer = _find_wrappers(model)
    if not outer or not all(_is_known(wrapper.get_base_layer()) for wrapper in outer):
        return None
    for wrapper in outer:
        wrapper.forward = _Forward(wrapper)

    def give_back() -> None:
        for wrapper in outer:
            del wrapper.forward

    return give_back


def _find_wrappers(model: nn.Module) -> list[Any]:
    """Return the outermost wrapper of each module of experts: PEFT wraps one parameter after the other."""
    found = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inner = {id(wrapper.base_layer) for wrapper in found}
    return [wrapper for wrapper in found if id(wrapper) not in inner]


def _is_known(experts: Any) -> bool:
    names = ("gate_up_proj" if getattr(experts, "has_gate", False) else "up_proj", "down_proj")
    return (
        all(hasattr(experts, mark) for mark in _MARKS)
        and not getattr(experts, "_is_expert_parallel", False)
        and all(isinstance(getattr(experts, name, None), nn.Parameter) for name in names)
    )


class _Forward:
    """The forward pass of wrapped experts."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.experts = wrapper.get_base_layer()
        self.adapters: dict[str, Any] = {}
        while isinstance(wrapper, ParamWrapper):
            self.adapters[wrapper.parameter_name] = wrapper
            wrapper = wrapper.base_layer

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs [T, H].

        Args:
            hidden: [T, H]
            top_k_index: [T, K], the experts of each token.
            top_k_weights: [T, K], their weights.
        """
        wrapper, experts = self.wrapper, self.experts
        if wrapper.disable_adapters or wrapper.merged:
            result: Tensor = type(wrapper).forward(wrapper, hidden, top_k_index, top_k_weights)
            return result
        num_tokens, num_chosen = top_k_index.shape
        ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        numbers = torch.arange(1, experts.num_experts + 1, device=ids.device)
        ends = torch.searchsorted(ids, numbers, side="left").to(torch.int32)
        rows = _Spread.apply(hidden, order, inverse, num_chosen)
        name = "gate_up_proj" if experts.has_gate else "up_proj"
        rows = self._project(name, rows, ids, ends)
        rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
        rows = self._project("down_proj", rows, ids, ends)
        if experts.has_post_expert_norm:
            rows = experts.post_expert_norm(rows)
        rows = rows * _Reorder.apply(top_k_weights.reshape(-1, 1), order, inverse)
        rows = _Reorder.apply(rows, inverse, order)
        return rows.view(num_tokens, num_chosen, -1).sum(1).to(hidden.dtype)

    def _project(self, name: str, rows: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        """Return the product [S, outputs] of rows ordered by expert with a parameter, its adapter included."""
        experts = self.experts
        weight = getattr(experts, name)
        rows = rows.to(weight.dtype)
        outputs = multiply_grouped(rows, weight if experts.is_transposed else weight.transpose(1, 2), ends)
        if experts.has_bias:
            outputs = outputs + getattr(experts, f"{name}_bias")[ids]
        if name in self.adapters:
            down, up, scale = read_factors(self.adapters[name])
            small = multiply_grouped(rows, down.to(weight.dtype), ends)
            outputs = outputs + multiply_grouped(small, up.to(weight.dtype), ends) * scale
        return outputs


def read_factors(wrapper: Any) -> tuple[Tensor, Tensor, float]:
    """Return A' [E, inputs, R] and B' [E, R, outputs] of a wrapped parameter, and the factor of their product.

    PEFT keeps them as A [E R, inputs] and B [outputs, R E].
    """
    (name,) = wrapper.lora_A
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    num_experts = wrapper.num_experts
    down = a.reshape(num_experts, -1, a.shape[1]).transpose(1, 2)
    up = b.reshape(b.shape[0], -1, num_experts).permute(2, 1, 0).contiguous()
    return down, up, float(wrapper.scaling[name])


class _Spread(torch.autograd.Function):
    """[T, H] -> [S, H] ordered by expert; sums of the gradient are taken in one order."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, inverse: Tensor, num_chosen: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_chosen = num_chosen
        return hidden.index_select(0, order // num_chosen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (-1, ctx.num_chosen)).sum(1), None, None, None


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient needs no sums."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
