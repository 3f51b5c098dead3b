"""The forward pass of a decoder-only transformer with LoRA, put together from fused blocks.

Dimensions: `T` tokens of a flat batch (examples end to end), `H` hidden size, `N` trained positions, `V` vocabulary.

`recognize_decoder` reads the layers of a model that transformers and PEFT have built. A model that it does not know in
every detail is refused, and the general engine trains it. The parameters stay where they are: an adapter trained here
is PEFT's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.decoder import elementwise
from tasks.decoder.adapters import AdapterGroup, bind_gradients, refresh
from tasks.decoder.attention import Attention, Segments
from tasks.decoder.blocks import Norm, last_output_unused
from tasks.decoder.delta_rule import DeltaRule, run_plain_rule
from tasks.decoder.dropout import Dropout
from tasks.decoder.grouped import ExpertAdapters
from tasks.decoder.head import HeadLoss
from tasks.decoder.layer import Layer, attend_scaled, run_layer
from tasks.decoder.layer_inputs import LayerInputs
from tasks.decoder.mixers import DeltaNet, Forward, KeysValues, name_shared

# Bytes of logits that exist at a time.
LOGITS_BYTES = 1 << 30


@dataclass(frozen=True)
class Decoder:
    """A recognized model."""

    embed: Callable[[Tensor], Tensor]
    """[T] -> [T, H]"""
    angles: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]
    """(states, positions [T], rope) -> cos, sin [T, R / 2], of the R columns of a head that are rotated"""
    layers: tuple[Layer, ...]
    norm: Norm
    head: nn.Linear
    attend: Attention
    ops: ModuleType
    """`elementwise`, or `kernels` on a GPU with Triton."""
    scale_queries: Callable[[Tensor], Tensor] | None = None
    """positions [T] -> [T], factors of the rotated queries (Ministral 3)."""
    dropout: Dropout | None = None
    """Of the adapter, where gradients are taken."""
    delta_rule: DeltaRule = run_plain_rule
    logit_cap: float | None = None
    """c, where logits x are c tanh(x / c) (Gemma)."""
    layer_inputs: LayerInputs | None = None
    """Of Gemma 4."""

    def invalidate(self) -> None:
        """Say that the trained matrices have changed."""
        for group in self._groups():
            group.invalidate()

    def refresh(self) -> None:
        """Bring the working copies of the trained matrices up to date; cheap when nothing has changed."""
        refresh(self._groups(), getattr(self.ops, "copy_matrices", None))

    def bind_gradients(self) -> Tensor | None:
        """Give the trained matrices gradients that stay where they are; see `adapters.bind_gradients`."""
        return bind_gradients(self._groups())

    def has_bound_gradients(self) -> bool:
        """Say whether passes add to gradients in place."""
        return any(group.is_bound for group in self._groups())

    @property
    def has_delta_nets(self) -> bool:
        """Whether some layers have a delta rule in place of attention."""
        return any(isinstance(layer.mixer, DeltaNet) for layer in self.layers)

    def _groups(self) -> list[AdapterGroup | ExpertAdapters]:
        further = [] if self.layer_inputs is None else [self.layer_inputs.projection.adapters]
        return [*further, *(group for layer in self.layers for group in layer.adapters)]


def compute_losses(
    decoder: Decoder,
    input_ids: Tensor,
    positions: Tensor,
    segments: Segments,
    trained: Tensor,
    targets: Tensor,
    *,
    num_recomputed: int = 0,
    logits_bytes: int = LOGITS_BYTES,
    runs_all: bool = False,
) -> Tensor:
    """Return -log p(target) of the trained positions [N] (nats, fp32); 0 where a target does not count.

    Their weights come with the backward pass. The adapter drops where gradients are taken, by the key that
    `decoder.dropout` holds, backward pass included.

    Args:
        decoder: with its working copies refreshed.
        input_ids: [T]
        positions: [T], from 0 in each example.
        segments: the examples' borders.
        trained: [N] distinct indices into T, at least one.
        targets: [N] token ids; one below 0 does not count.
        num_recomputed: layers, from the first, that keep only their input and run again in the backward pass.
        logits_bytes: that exist at a time.
        runs_all: the last layer runs at all positions, for the sake of its router's logits.
    """
    stream, delta, source = decoder.embed(input_ids), None, None
    dropout = decoder.dropout if torch.is_grad_enabled() else None
    key = None if dropout is None else dropout.key
    attend = decoder.attend
    if decoder.scale_queries is not None:
        attend = partial(attend_scaled, attend, decoder.scale_queries(positions).to(stream.dtype)[:, None, None])
    forward = Forward(
        decoder.ops, dropout, attend, decoder.delta_rule, segments, positions, _find_angles(decoder, stream, positions)
    )
    own_inputs: list[Tensor] | list[None] = [None] * len(decoder.layers)
    if decoder.layer_inputs is not None:
        own_inputs = decoder.layer_inputs.compute(input_ids, stream, decoder.ops, dropout)
    shared: dict[str, KeysValues | None] = {}
    for number, (layer, own_input) in enumerate(zip(decoder.layers, own_inputs, strict=True)):
        select = trained if number == len(decoder.layers) - 1 and not runs_all else None
        keeps, reads = name_shared(layer.mixer)
        run = partial(run_layer, layer, forward, select)
        arguments = shared.get(reads), own_input
        if number < num_recomputed and torch.is_grad_enabled():
            stream = stream if delta is None else stream + delta
            contexts = partial(_open_contexts, is_unused=layer.is_output_unread)
            stream, delta, kept = checkpoint(
                run, *arguments, stream, None, None, key, use_reentrant=False, preserve_rng_state=False,
                context_fn=contexts,
            )  # fmt: skip
        else:
            stream, delta, kept = run(*arguments, stream, delta, source, key)
        shared |= {keeps: kept} if keeps else {}
        source = layer.last
    if runs_all:
        stream, delta, source = stream.index_select(0, trained), _select(delta, trained), None
    weight = decoder.head.weight
    chunk = max(64, logits_bytes // (weight.shape[0] * weight.element_size()))
    losses: Tensor = HeadLoss.apply(
        stream, delta, source, targets, decoder.norm, _Head(decoder.head, decoder.logit_cap), chunk, decoder.ops
    )
    return losses


def _select(delta: Tensor | None, positions: Tensor) -> Tensor | None:
    return None if delta is None else delta.index_select(0, positions)


def _find_angles(decoder: Decoder, stream: Tensor, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the angles of each kind that a layer asks for."""
    mixers = [layer.mixer for layer in decoder.layers if not isinstance(layer.mixer, DeltaNet)]
    return {mixer.rope: decoder.angles(stream, positions, mixer.rope) for mixer in mixers}


def _open_contexts(*, is_unused: bool) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a layer's first run and of its second."""
    return nullcontext(), last_output_unused() if is_unused else nullcontext()


class _Head:
    """The frozen output head."""

    def __init__(self, module: nn.Linear, cap: float | None) -> None:
        self.module = module
        self.cap = cap

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits [N, V]."""
        bias = self.module.bias
        weight = self.module.weight.t()
        return torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient [N, H] of the rows."""
        return torch.mm(grad, self.module.weight)


def choose_operations(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the Triton kernels on a GPU that has Triton and a dtype below fp64, else plain PyTorch."""
    if device.type == "cuda" and dtype != torch.float64:
        try:
            from tasks.decoder import kernels
        except ImportError:
            return elementwise
        return kernels
    return elementwise
