"""The forward pass of a decoder-only transformer, put together from fused blocks: with LoRA, or weights of its own.

Dimensions: `T` tokens of a flat batch (examples end to end), `H` hidden size, `N` trained positions, `V` vocabulary.

`recognize_decoder` reads the layers of a model that transformers and PEFT have built. A model that it does not know in
every detail is refused, and the general engine trains it. The parameters stay where they are: an adapter trained here
is PEFT's, and weights are the model's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from tasks.decoder import elementwise
from tasks.decoder.adapters import AdapterGroup, bind_gradients, refresh
from tasks.decoder.attention import Attention, Segments
from tasks.decoder.delta_rule import DeltaRule, run_plain_rule
from tasks.decoder.divided import DividedLayers, WayBack
from tasks.decoder.dropout import Dropout
from tasks.decoder.forward import Forward
from tasks.decoder.grouped import ExpertAdapters
from tasks.decoder.head import Head, HeadLoss, TrainedHeadLoss
from tasks.decoder.host_inputs import HostMemory
from tasks.decoder.layer import Layer, attend_scaled, run_layer
from tasks.decoder.layer_inputs import LayerInputs
from tasks.decoder.mixers import DeltaNet, KeysValues, name_shared
from tasks.decoder.norms import Norm
from tasks.decoder.projections import AnyProjection
from tasks.decoder.recomputation import Outputs, Recomputation, plan_recomputation, run_twice
from tasks.decoder.weights import TrainedWeights, WeightGroup

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
    head: Head
    attend: Attention
    ops: ModuleType
    """`elementwise`, or `kernels` on a GPU with Triton."""
    scale_queries: Callable[[Tensor], Tensor] | None = None
    """positions [T] -> [T], factors of the rotated queries (Ministral 3)."""
    dropout: Dropout | None = None
    """Of the adapter, where gradients are taken."""
    delta_rule: DeltaRule = run_plain_rule
    layer_inputs: LayerInputs | None = None
    """Of Gemma 4."""
    weights: TrainedWeights | None = None
    """The decoder's own, where those are trained and there is no adapter."""
    divided: DividedLayers | None = None
    """Gathers the layers' frozen weights where ranks have divided these among them, or makes the working copies of
    trained ones."""

    def invalidate(self) -> None:
        """Say that what is trained has changed."""
        if self.weights is not None:
            self.weights.invalidate()
        for group in self._groups():
            group.invalidate()

    def refresh(self) -> None:
        """Bring the working copies of what is trained up to date; cheap when nothing has changed."""
        has_changed = self.weights is not None and self.weights.refresh()
        has_changed |= refresh(self._groups(), getattr(self.ops, "copy_matrices", None))
        if has_changed and self.divided is not None:
            self.divided.forget()

    def bind_gradients(self) -> Tensor | None:
        """Give what is trained gradients that stay where they are; see `adapters.bind_gradients`, `weights.bind`."""
        return bind_gradients(self._groups()) if self.weights is None else self.weights.bind()

    def has_bound_gradients(self) -> bool:
        """Say whether passes add to gradients in place."""
        if self.weights is not None:
            return self.weights.flat is not None
        return any(group.is_bound for group in self._groups())

    def clear_gradients(self) -> None:
        """Set the gradients of the decoder's own weights, which stay where they are, to zero."""
        assert self.weights is not None
        assert self.weights.flat is not None
        self.weights.flat.zero_()

    def list_head_parameters(self) -> tuple[Tensor, ...]:
        """Return what is trained now of head and last norm."""
        return (*self.head.parameters, *self.norm.parameters)

    @property
    def has_delta_nets(self) -> bool:
        """Whether some layers have a delta rule in place of attention."""
        return any(isinstance(layer.mixer, DeltaNet) for layer in self.layers)

    def _groups(self) -> list[AdapterGroup | ExpertAdapters]:
        further = [] if self.layer_inputs is None else [self.layer_inputs.projection.adapters]
        groups = [*further, *(group for layer in self.layers for group in layer.adapters)]
        singles = [single for group in groups for single in getattr(group, "lanes", (group,))]
        return [group for group in singles if not isinstance(group, WeightGroup)]


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
    scale: Tensor | None = None,
    piece_tokens: int = 0,
    host: HostMemory | None = None,
    num_in_host: int = 0,
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
        scale: [] fp32: what the gradient of every loss is going to be, where gradients are bound and that is known: a
            trained head's own is then made with the losses.
        piece_tokens: of the pieces in which recomputed layers run their gated layer; 0: whole.
        host: where inputs of recomputed layers can lie.
        num_in_host: layers, from the first, whose input lies there; not the last recomputed one, which is wanted first.
    """
    recomputation = plan_recomputation(num_recomputed, piece_tokens, host, num_in_host)
    select = None if runs_all else trained
    stream, delta, source = _run_layers(decoder, input_ids, positions, segments, select, recomputation, num_recomputed)
    if runs_all:
        stream, delta, source = stream.index_select(0, trained), _select(delta, trained), None
    head, trained_head = decoder.head, decoder.list_head_parameters()
    settings = stream, delta, source, targets, decoder.norm, head, head.count_rows(logits_bytes), decoder.ops
    if trained_head and scale is None and torch.is_grad_enabled():
        losses: Tensor = TrainedHeadLoss.apply(*settings, *trained_head)
    else:
        assert scale is None or decoder.has_bound_gradients()
        losses = HeadLoss.apply(*settings, scale, *trained_head)
    return losses


def _run_layers(
    decoder: Decoder,
    input_ids: Tensor,
    positions: Tensor,
    segments: Segments,
    select: Tensor | None,
    recomputation: Recomputation,
    num_recomputed: int,
) -> tuple[Tensor, Tensor | None, AnyProjection | None]:
    """Return the stream after the last layer, what is still to be added to it, and the projection that made this.

    The last layer runs at the positions of `select` alone, at all where that is None. The stream is made here, and has
    one name at a time: a layer's input that nobody names is no longer in the memory.
    """
    stream, delta, source = decoder.embed(input_ids), None, None
    forward = _open_forward(decoder, stream, positions, segments)
    key = None if forward.dropout is None else forward.dropout.key
    own_inputs: list[Tensor] | list[None] = [None] * len(decoder.layers)
    if decoder.layer_inputs is not None:
        own_inputs = decoder.layer_inputs.compute(input_ids, stream, decoder.ops, forward.dropout)
    shared: dict[str, KeysValues | None] = {}
    for number, (layer, own_input) in enumerate(zip(decoder.layers, own_inputs, strict=True)):
        is_last = number == len(decoder.layers) - 1
        keeps, reads = name_shared(layer.mixer)
        run: Callable[..., Outputs] = partial(run_layer, layer, forward, select if is_last else None)
        if decoder.divided is not None:
            decoder.divided.hold_forward(number, num_recomputed)
        if number < recomputation.num_layers:
            stream = stream if delta is None else stream + delta
            pieces = recomputation.piece_tokens
            run, stream = recomputation.put_away(number, partial(run, piece_tokens=pieces), stream)
            stream, delta, kept = run_twice(layer, run, pieces, shared.get(reads), own_input, stream, key)
        else:
            stream, delta, kept = run(shared.get(reads), own_input, stream, delta, source, key)
        stream, delta = recomputation.announce(number, stream, delta)
        if decoder.divided is not None:
            stream, delta = WayBack.apply(decoder.divided, number, num_recomputed, stream, delta)
        shared |= {keeps: kept} if keeps else {}
        source = layer.last
    return stream, delta, source


def _open_forward(decoder: Decoder, stream: Tensor, positions: Tensor, segments: Segments) -> Forward:
    """Return what the layers of a pass share."""
    attend = decoder.attend
    if decoder.scale_queries is not None:
        attend = partial(attend_scaled, attend, decoder.scale_queries(positions).to(stream.dtype)[:, None, None])
    dropout = decoder.dropout if torch.is_grad_enabled() else None
    angles = _find_angles(decoder, stream, positions)
    return Forward(decoder.ops, dropout, attend, decoder.delta_rule, segments, positions, angles)


def _select(delta: Tensor | None, positions: Tensor) -> Tensor | None:
    return None if delta is None else delta.index_select(0, positions)


def _find_angles(decoder: Decoder, stream: Tensor, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the angles of each kind that a layer asks for."""
    mixers = [layer.mixer for layer in decoder.layers if not isinstance(layer.mixer, DeltaNet)]
    return {mixer.rope: decoder.angles(stream, positions, mixer.rope) for mixer in mixers}


def choose_operations(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the Triton kernels on a GPU that has Triton and a dtype below fp64, else plain PyTorch."""
    if device.type == "cuda" and dtype != torch.float64:
        try:
            from tasks.decoder import kernels
        except ImportError:
            return elementwise
        return kernels
    return elementwise
