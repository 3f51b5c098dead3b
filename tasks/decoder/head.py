"""The loss of the trained positions, whose logits exist for some rows at a time.

Dimensions: `N` trained positions, `H` hidden size, `V` vocabulary.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tasks.decoder.adapters import add_product
from tasks.decoder.norms import Norm
from tasks.decoder.projections import AnyProjection
from tasks.decoder.weights import TrainedWeights

# Tensor cores take rows that begin at a multiple of 16 bytes; logits of other widths go through products of a fourth of
# the speed (measured on an H200 with OLMo 3's 100,278 tokens).
_ALIGNED = 64


class Head:
    """The output head, frozen or trained.

    In 16 bits its rows are filled up with zeros to a multiple of 64, where they are not one: V' of them.
    """

    def __init__(self, module: nn.Linear, cap: float | None = None, weights: TrainedWeights | None = None) -> None:
        self.module = module
        self.cap = cap
        """c, where logits x become c tanh(x / c)"""
        self.weights = weights
        self.num_tokens = module.weight.shape[0]
        """V"""
        self.bias = None if module.bias is None else _fill_up(module.bias.data)
        is_trained = weights is not None and module.weight.requires_grad
        dtype = weights.dtype if weights is not None and is_trained else module.weight.dtype
        self.weight = module.weight.data
        """[V', H], in the working dtype"""
        if dtype != module.weight.dtype:
            self.weight = _fill_up(module.weight.data.to(dtype))
        elif not is_trained:
            self.weight = _fill_up(module.weight.data)
            module.weight.data = self.weight[: self.num_tokens]  # nothing lies twice
        if weights is not None and is_trained:
            weights.add(module.weight)
            if dtype != module.weight.dtype:
                weights.follow(module.weight, self.weight[: self.num_tokens])

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What is trained now."""
        return (self.module.weight,) if self.weights is not None and self.module.weight.requires_grad else ()

    def count_rows(self, logits_bytes: int) -> int:
        """Return how many rows of logits take so many bytes, at least 64."""
        return max(64, logits_bytes // (self.weight.shape[0] * self.weight.element_size()))

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits [N, V], the first columns of [N, V'] whose others are finite."""
        weight = self.weight.t()
        logits = torch.mm(rows, weight) if self.bias is None else torch.addmm(self.bias, rows, weight)
        return logits[:, : self.num_tokens]

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient [N, H] of the rows; `grad` lies where `forward` has put the logits."""
        whole = grad.as_strided((grad.shape[0], self.weight.shape[0]), (self.weight.shape[0], 1))
        return torch.mm(whole, self.weight)

    def add_grad(self, total: Tensor | None, grad: Tensor, rows: Tensor) -> Tensor | None:
        """Add some rows' gradient of the weight to the one that stays, or to the total of those before them.

        Args:
            total: [V, H]; None at first, and where gradients stay.
            grad: of the logits [N, V].
            rows: [N, H].
        """
        if not self.parameters:
            return None
        assert self.weights is not None
        if total is None:
            return self.weights.give_product(self.module.weight, grad.t(), rows)
        add_product(total, grad.t(), rows, 1.0)
        return total


class HeadLoss(torch.autograd.Function):
    """-log p(target) [N], fp32, of rows [N, H]; logits exist for `chunk` of them at a time.

    The gradient of each row's loss is made with it; what the losses weigh in the end comes with the backward pass. A
    trained head's own gradient is made as well, and has to know that beforehand: one `scale` for all losses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        delta: Tensor | None,
        source: AnyProjection | None,
        targets: Tensor,
        norm: Norm,
        head: Head,
        chunk: int,
        ops: ModuleType,
        scale: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        """Make the gradient together with the loss, while the logits are there."""
        normed = torch.empty_like(residual)
        total, rstd = ops.add_norm(residual, delta, norm.weight, norm.eps, normed)
        losses = []
        goes_on = any(ctx.needs_input_grad[:2]) or bool(norm.parameters and parameters)
        for rows, row_targets in zip(normed.split(chunk), targets.split(chunk), strict=True):
            logits = head.forward(rows)
            losses.append(ops.cross_entropy(logits, row_targets, head.cap))
            if scale is not None:
                head.add_grad(None, logits, (rows * scale.reshape(1, 1)).to(rows.dtype))  # in the scale's fp32
            if goes_on:
                rows.copy_(head.backward(logits))
            del logits
        if goes_on:
            if scale is not None and norm.parameters:
                norm.give(ops.sum_normed(normed, total, rstd) * scale)
            # Without a delta the sum is the stream itself, which others still read.
            result = total if delta is not None else torch.empty_like(total)
            ops.norm_backward(normed, total, rstd, norm.weight, None, result)
            total = result
        ctx.save_for_backward(total)
        ctx.source, ctx.num_parameters, ctx.has_delta = source, len(parameters), delta is not None
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Weigh the rows of the gradient that the forward pass has made."""
        (rows,) = ctx.saved_tensors
        result = None
        if any(ctx.needs_input_grad[:2]):
            result = rows if ctx.source is None else ctx.source.allocate_grad(rows.shape[0])[0]
            # In the gradient's fp32: one over the step's tokens, rounded to 16 bits, would tilt all of them alike.
            result.copy_(rows.to(grad.dtype) * grad[:, None])
            if ctx.source is not None:
                ctx.source.forget_grad()
        other = result if ctx.has_delta else None
        return result, other, None, None, None, None, None, None, None, *[None] * ctx.num_parameters


class TrainedHeadLoss(torch.autograd.Function):
    """As `HeadLoss`, for a trained head whose losses weigh what nobody knows before: its logits are made twice."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        delta: Tensor | None,
        source: AnyProjection | None,
        targets: Tensor,
        norm: Norm,
        head: Head,
        chunk: int,
        ops: ModuleType,
        *parameters: Tensor,
    ) -> Tensor:
        """Make the losses alone."""
        normed = torch.empty_like(residual)
        total, rstd = ops.add_norm(residual, delta, norm.weight, norm.eps, normed)
        ctx.save_for_backward(total, rstd, targets)
        ctx.settings, ctx.has_delta = (source, norm, head, chunk, ops), delta is not None
        pairs = zip(normed.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([ops.cross_entropy(head.forward(rows), targets, head.cap) for rows, targets in pairs])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Make logits and their gradient again, by now weighed."""
        total, rstd, targets = ctx.saved_tensors
        source, norm, head, chunk, ops = ctx.settings
        normed, weight_grad = torch.empty_like(total), None
        ops.add_norm(total, None, norm.weight, norm.eps, normed)
        for rows, row_targets, row_grad in zip(
            normed.split(chunk), targets.split(chunk), grad.split(chunk), strict=True
        ):
            logits = head.forward(rows)
            ops.cross_entropy(logits, row_targets, head.cap)
            logits.mul_(row_grad[:, None])
            weight_grad = head.add_grad(weight_grad, logits, rows)
            rows.copy_(head.backward(logits))
            del logits
        trained = [weight_grad] if head.parameters else []
        trained += norm.compute_grads(ops, normed, total, rstd)
        result = None
        if any(ctx.needs_input_grad[:2]):
            result = torch.empty_like(total) if source is None else source.allocate_grad(total.shape[0])[0]
            ops.norm_backward(normed, total, rstd, norm.weight, None, result)
            if source is not None:
                source.forget_grad()
        return result, result if ctx.has_delta else None, None, None, None, None, None, None, *trained


def _fill_up(values: Tensor) -> Tensor:
    """Return values with rows of zeros after them, up to a multiple of what the products want; themselves if they are.

    In fp32 and fp64, where there is no such product, they stay as they are.
    """
    missing = -values.shape[0] % _ALIGNED
    if not missing or values.dtype not in (torch.bfloat16, torch.float16):
        return values
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
