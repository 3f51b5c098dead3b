"""The gated layer in pieces of tokens, for layers that run again: what is wide in it exists for one piece at a time.

Dimensions: `T` tokens of a flat batch, `H` hidden size, `I` intermediate size, `P` tokens of a piece.

Norm, gate and up, activation, down and the norm after it take each token by itself. So their forward pass goes through
pieces of P tokens, keeps nothing but the stream and what joins it, and the backward pass computes each piece again just
before its gradient: [P, 2 I] in place of [T, 2 I], with as many products as where the whole layer runs again at once.

Each piece adds its part to the gradients of what is trained: they are the whole's up to the order of fp32 additions.
Dropout's masks are the whole's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tasks.decoder.blocks import is_last_output_unused, last_output_unused
from tasks.decoder.dropout import Dropout
from tasks.decoder.projections import AnyProjection
from tasks.decoder.rooms import copy_rows

PIECE_TOKENS = 8192
"""Of a piece: products with as many rows fill a large GPU."""

Gated = Callable[[Dropout | None, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(dropout, stream [P, H], delta [P, H]) -> the stream with delta added, and what the gated layer adds to it."""


class InPieces(torch.autograd.Function):
    """([T, H], [T, H]) -> what a gated layer gives for them, by pieces."""

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        delta: Tensor,
        run: Gated,
        size: int,
        dropout: Dropout | None,
        source: AnyProjection | None,
        is_output_unread: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run the pieces one after the other; where the layer runs again and nobody reads what it gives, none."""
        total, result = torch.empty_like(stream), torch.empty_like(stream)
        if not is_last_output_unused():
            for piece, masks in _cut(len(stream), size, dropout):
                total_piece, result_piece = run(masks, stream[piece], delta[piece])
                total[piece], result[piece] = total_piece, result_piece
        key = None if dropout is None else dropout.key
        ctx.save_for_backward(stream, delta, key, *parameters)
        ctx.settings = run, size, dropout, source, is_output_unread
        return total, result

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor, grad: Tensor) -> tuple[Any, ...]:
        """Run each piece again and go back through it."""
        stream, delta, _, *parameters = ctx.saved_tensors
        run, size, dropout, source, is_output_unread = ctx.settings
        if source is None:
            result = torch.empty_like(stream)
        else:
            result = source.allocate_grad(len(stream))[0]
            source.forget_grad()  # its float8 copy would have to be made of the whole: the projection makes its own
        sums: list[Tensor | None] = [None] * len(parameters)
        for piece, masks in _cut(len(stream), size, dropout):
            inputs = [tensor[piece].detach().requires_grad_() for tensor in (stream, delta)]
            with torch.enable_grad(), last_output_unused() if is_output_unread else nullcontext():
                outputs = run(masks, *inputs)
            found = torch.autograd.grad(
                outputs, [*inputs, *parameters], [total_grad[piece], grad[piece]], allow_unused=True
            )
            copy_rows(found[1], result[piece])
            _add(sums, found[2:])
        return result, result, None, None, None, None, None, *sums


def _cut(num_tokens: int, size: int, dropout: Dropout | None) -> Iterator[tuple[slice, Dropout | None]]:
    """Return the pieces of some tokens, each with the masks of its rows."""
    for start in range(0, num_tokens, size):
        masks = None if dropout is None else replace(dropout, first_row=start)
        yield slice(start, min(start + size, num_tokens)), masks


def _add(sums: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Add a piece's gradients; those that are added in place elsewhere are None."""
    for number, grad in enumerate(grads):
        if grad is not None:
            before = sums[number]
            sums[number] = grad if before is None else before.add_(grad)
