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

_NUM_OTHERS = 7
"""Arguments of `InPieces` before what is trained."""

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
        needs_stream, needs_delta, *_ = ctx.needs_input_grad
        trained = [number for number in range(len(parameters)) if ctx.needs_input_grad[_NUM_OTHERS + number]]
        sums: list[Tensor | None] = [None] * len(parameters)
        result = _make_room(stream, source) if needs_stream or needs_delta else None
        for piece, masks in _cut(len(stream), size, dropout):
            inputs = stream[piece].detach(), delta[piece].detach().requires_grad_(result is not None)
            with torch.enable_grad(), last_output_unused() if is_output_unread else nullcontext():
                outputs = run(masks, *inputs)
            grads = total_grad[piece], grad[piece]
            wanted = [parameters[number] for number in trained]
            if result is None:  # nothing before this layer is trained, and nothing of what joins the stream
                _add(sums, trained, torch.autograd.grad(outputs[1], wanted, grads[1], allow_unused=True))
                continue
            # The stream's gradient is that of what joins it: it is their sum which goes on.
            of_delta, *found = torch.autograd.grad(outputs, [inputs[1], *wanted], grads, allow_unused=True)
            copy_rows(of_delta, result[piece])
            _add(sums, trained, found)
        others = [None] * (_NUM_OTHERS - 2)
        return result if needs_stream else None, result if needs_delta else None, *others, *sums


def _make_room(like: Tensor, source: AnyProjection | None) -> Tensor:
    """Return room for a gradient [T, H] where the projection that made what joined the stream wants it."""
    if source is None:
        return torch.empty_like(like)
    room = source.allocate_grad(len(like))[0]
    source.forget_grad()  # a float8 copy is of all rows at once: the projection makes its own
    return room


def _cut(num_tokens: int, size: int, dropout: Dropout | None) -> Iterator[tuple[slice, Dropout | None]]:
    """Return the pieces of some tokens, each with the masks of its rows."""
    for start in range(0, num_tokens, size):
        masks = None if dropout is None else replace(dropout, first_row=start)
        yield slice(start, min(start + size, num_tokens)), masks


def _add(sums: list[Tensor | None], numbers: Sequence[int], grads: Sequence[Tensor | None]) -> None:
    """Add a piece's gradients; those that are added in place elsewhere are None."""
    for number, grad in zip(numbers, grads, strict=True):
        if grad is not None:
            before = sums[number]
            sums[number] = grad if before is None else before.add_(grad)
