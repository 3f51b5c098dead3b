"""The loss of the trained positions, whose logits exist for some rows at a time.

Dimensions: `N` trained positions, `H` hidden size, `V` vocabulary.
"""

from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from tasks.decoder.blocks import Norm
from tasks.decoder.projections import AnyProjection


class Head(Protocol):
    """The frozen output head."""

    @property
    def cap(self) -> float | None:
        """Return c, where logits x become c tanh(x / c)."""
        ...

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits [N, V]."""
        ...

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient [N, H] of the rows."""
        ...


class HeadLoss(torch.autograd.Function):
    """-log p(target) [N], fp32, of rows [N, H]; logits exist for `chunk` of them at a time.

    The gradient of each row's loss is made with it; what the losses weigh in the end comes with the backward pass.
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
    ) -> Tensor:
        """Make the gradient together with the loss, while the logits are there."""
        normed = torch.empty_like(residual)
        total, rstd = ops.add_norm(residual, delta, norm.weight, norm.eps, normed)
        losses = []
        for rows, row_targets in zip(normed.split(chunk), targets.split(chunk), strict=True):
            logits = head.forward(rows)
            losses.append(ops.cross_entropy(logits, row_targets, head.cap))
            if any(ctx.needs_input_grad[:2]):
                rows.copy_(head.backward(logits))
            del logits
        if any(ctx.needs_input_grad[:2]):
            # Without a delta the sum is the stream itself, which others still read.
            result = total if delta is not None else torch.empty_like(total)
            ops.norm_backward(normed, total, rstd, norm.weight, None, result)
            total = result
        ctx.save_for_backward(total)
        ctx.has_delta = delta is not None
        ctx.source = source
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Weigh the rows of the gradient that the forward pass has made."""
        (rows,) = ctx.saved_tensors
        result = rows if ctx.source is None else ctx.source.allocate_grad(rows.shape[0])[0]
        # In the gradient's fp32: one over the step's tokens, rounded to 16 bits, would tilt all of them the same way.
        result.copy_(rows.to(grad.dtype) * grad[:, None])
        if ctx.source is not None:
            ctx.source.forget_grad()
        return result, result if ctx.has_delta else None, None, None, None, None, None, None
