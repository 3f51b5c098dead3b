"""Layers that keep only their input in the forward pass, and run again in the backward pass.

Dimensions: `T` tokens of a flat batch (examples end to end), `H` hidden size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tasks.decoder.blocks import last_output_unused
from tasks.decoder.host_inputs import HostInputs, HostMemory
from tasks.decoder.layer import Layer
from tasks.decoder.mixers import KeysValues

Outputs = tuple[Tensor, Tensor | None, KeysValues | None]
"""Of `run_layer`."""


@dataclass(frozen=True)
class Recomputation:
    """Which layers of a pass run again, from the first, and where their inputs lie until then."""

    num_layers: int
    piece_tokens: int
    """Of the pieces in which such a layer runs its gated layer; 0: whole."""
    inputs: HostInputs | None
    """Of layers whose input lies in the host's memory; None: there is none."""
    num_in_host: int
    """Layers, from the first, whose input lies there."""

    def put_away(
        self, number: int, run: Callable[..., Outputs], stream: Tensor
    ) -> tuple[Callable[..., Outputs], Tensor]:
        """Return how a layer is run and on what: on a placeholder, where its input [T, H] is sent to the host."""
        if self.inputs is None or number >= self.num_in_host:
            return run, stream
        return partial(_run_taken, self.inputs, number, run), self.inputs.replace(number, stream)

    def announce(self, number: int, stream: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what a layer gives; the backward pass of the first whose input stays calls the last one sent back."""
        if self.inputs is None or number != self.num_in_host:
            return stream, delta
        return self.inputs.announce(number - 1, stream, delta)


def plan_recomputation(num_layers: int, piece_tokens: int, host: HostMemory | None, num_in_host: int) -> Recomputation:
    """Return what is recomputed in a pass: nothing where no gradients are taken.

    Args:
        num_layers: from the first, that keep only their input.
        piece_tokens: of the pieces in which they run their gated layer; 0: whole.
        host: where their inputs can lie.
        num_in_host: layers, from the first, whose input lies there; the last recomputed one's never does, as it is
            wanted first.
    """
    if not torch.is_grad_enabled():
        return Recomputation(0, 0, None, 0)
    if host is None or not num_in_host:
        return Recomputation(num_layers, piece_tokens, None, 0)
    return Recomputation(num_layers, piece_tokens, HostInputs(host), min(num_in_host, num_layers - 1))


def run_twice(
    layer: Layer,
    run: Callable[..., Outputs],
    piece_tokens: int,
    shared: KeysValues | None,
    own_input: Tensor | None,
    stream: Tensor,
    key: Tensor | None,
) -> Outputs:
    """Run a layer now, and again for its gradient.

    Args:
        layer: that is run.
        run: `run_layer` of it, from `Recomputation.put_away`.
        piece_tokens: of the pieces in which its gated layer runs.
        shared: another layer's keys and values.
        own_input: [T, P] of the layer.
        stream: [T, H] with all that was to be added, or the placeholder.
        key: of dropout; where it has changed by the second run, `checkpoint` refuses it.
    """
    result: Outputs = checkpoint(
        run, shared, own_input, stream, None, None, key, use_reentrant=False, preserve_rng_state=False,
        context_fn=partial(_open_contexts, is_unused=layer.is_unread_with(piece_tokens)),
    )  # fmt: skip
    return result


def _run_taken(
    inputs: HostInputs,
    number: int,
    run: Callable[..., Outputs],
    shared: KeysValues | None,
    own_input: Tensor | None,
    placeholder: Tensor,
    *arguments: Any,
) -> Outputs:
    """Run a layer whose input lies in the host's memory."""
    return run(shared, own_input, inputs.take(number, placeholder), *arguments)


def _open_contexts(*, is_unused: bool) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a layer's first run and of its second."""
    return nullcontext(), last_output_unused() if is_unused else nullcontext()
