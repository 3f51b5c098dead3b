"""One layer of the decoder: what it is made of, and its forward pass.

Dimensions: `T` tokens of a flat batch (examples end to end), `H` hidden size.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder.adapters import AdapterGroup
from tasks.decoder.attention import Attention, Segments
from tasks.decoder.blocks import GatedProject, NormProject, OutputNorm, Project, Select, output_wanted
from tasks.decoder.dropout import Dropout
from tasks.decoder.experts import AddNorm, ExpertLayer, run_experts
from tasks.decoder.forward import Forward
from tasks.decoder.further_blocks import Scale
from tasks.decoder.grouped import ExpertAdapters
from tasks.decoder.mixers import KeysValues, Mixer, list_inner, mix
from tasks.decoder.norms import Norm, list_parameters
from tasks.decoder.pieces import InPieces
from tasks.decoder.projections import AnyProjection
from tasks.decoder.weights import WeightGroup


@dataclass(frozen=True)
class LayerInput:
    """What a layer adds of an input of its own (Gemma 4)."""

    gate: AnyProjection
    output: AnyProjection
    norm: Norm


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    input_norm: Norm | None
    qkv: AnyProjection
    """What the mixer reads."""
    mixer: Mixer
    output: AnyProjection
    attention_out_norm: Norm | None
    """Before the mixer's output joins the stream (Gemma)."""
    gate_norm: Norm | None
    gate_up: AnyProjection | None
    """Of the gated layer, or of the shared experts; None where there are routed ones alone."""
    activation: str
    down: AnyProjection | None
    gate_out_norm: Norm | None
    output_scale: float = 1.0
    """Of what the mixer and the gated layer add to the stream."""
    layer_input: LayerInput | None = None
    stream_scale: float | None = None
    """Of the stream that the layer gives (Gemma 4)."""
    experts: ExpertLayer | None = None
    """Routed ones."""
    expert_norms: tuple[Norm, ...] = ()
    """Of routed experts beside the gated layer: of its output, and of their input and output (Gemma 4)."""

    @property
    def projections(self) -> tuple[AnyProjection, ...]:
        """All groups of linear layers."""
        further = () if self.layer_input is None else (self.layer_input.gate, self.layer_input.output)
        groups = (self.qkv, *list_inner(self.mixer), self.output, self.gate_up, self.down, *further)
        return tuple(group for group in groups if group is not None)

    @property
    def adapters(self) -> tuple[AdapterGroup | WeightGroup | ExpertAdapters, ...]:
        """All that is trained beside the norms."""
        return *(group.adapters for group in self.projections), *(self.experts.adapters if self.experts else ())

    @property
    def num_weights(self) -> int:
        """Weights that a token meets."""
        groups = [projection.adapters for projection in self.projections]
        linear = sum(group.joint_a.shape[1] * group.joint_b.shape[0] for group in groups)
        return linear + (self.experts.num_weights if self.experts else 0)

    @property
    def last(self) -> AnyProjection | None:
        """The projection whose product joins the stream as it is; None where there is something in between."""
        return self.down if self.is_output_unread and self.experts is None else None

    @property
    def can_run_in_pieces(self) -> bool:
        """Whether its gated layer can; routed experts gather their rows from all tokens."""
        return self.experts is None

    def is_unread_with(self, piece_tokens: int) -> bool:
        """`is_output_unread`; in pieces, what comes after the last product is in them."""
        is_plain = self.layer_input is None and self.stream_scale is None
        return self.is_output_unread or (piece_tokens > 0 and self.can_run_in_pieces and is_plain)

    @property
    def is_output_unread(self) -> bool:
        """A layer that runs again for its gradient has no use for its output."""
        is_plain = self.gate_out_norm is None and self.output_scale == 1.0
        return is_plain and self.layer_input is None and self.stream_scale is None


def run_layer(
    layer: Layer,
    forward: Forward,
    select: Tensor | None,
    shared: KeysValues | None,
    own_input: Tensor | None,
    stream: Tensor,
    delta: Tensor | None,
    source: AnyProjection | None,
    key: Tensor | None,
    *,
    piece_tokens: int = 0,
) -> tuple[Tensor, Tensor | None, KeysValues | None]:
    """Return the stream after the mixer, what the gated layer adds to it, and keys and values for later layers.

    Args:
        layer: its parts.
        forward: what the layers share.
        select: the only positions that are wanted; None: all.
        shared: another layer's keys and values, where this one attends to those.
        own_input: [T, P] of its `layer_input`.
        stream: [T, H]
        delta: [T, H], added first.
        source: the projection that made delta.
        key: of dropout, for `checkpoint` alone: it refuses to run the layer again once an argument has changed.
        piece_tokens: of the pieces in which the gated layer runs where that can be; 0: whole.
    """
    ops, dropout = forward.ops, forward.dropout
    stream, rows = _normed_project(layer.input_norm, layer.qkv, ops, dropout, stream, delta, source)
    mixed, kept = mix(layer.mixer, rows, layer.qkv, forward, shared)
    if select is not None:
        stream, mixed = Select.apply(stream, mixed, select)
    delta = Project.apply(mixed, layer.output, ops, dropout, *layer.output.adapters.parameters)
    delta, source = _finish(delta, layer.output, layer.attention_out_norm, layer.output_scale, ops)
    if layer.experts is not None and not layer.expert_norms:
        return *_run_experts(layer, layer.experts, ops, dropout, stream, delta, source), kept
    if layer.can_run_in_pieces and piece_tokens > 0:
        stream, delta = _run_pieces(layer, forward, piece_tokens, stream, delta, source)
    else:
        stream, delta = _run_gated(layer, ops, dropout, stream, delta, source)
    if layer.layer_input is not None:
        assert own_input is not None
        stream = stream + delta
        own_input = own_input if select is None else own_input.index_select(0, select)
        delta = _run_layer_input(layer.layer_input, layer.activation, stream, own_input, ops, dropout)
    if layer.stream_scale is not None:
        return (stream + delta) * layer.stream_scale, None, kept
    return stream, delta, kept


def _run_gated(
    layer: Layer,
    ops: ModuleType,
    dropout: Dropout | None,
    stream: Tensor,
    delta: Tensor,
    source: AnyProjection | None,
) -> tuple[Tensor, Tensor]:
    """Return the stream with delta added, and what the gated layer, and routed experts beside it, add to it."""
    assert layer.gate_up is not None
    assert layer.down is not None
    stream, gate_up = _normed_project(layer.gate_norm, layer.gate_up, ops, dropout, stream, delta, source)
    delta = _gated_project(layer, layer.gate_up, layer.down, ops, dropout, gate_up)
    source = layer.down
    if layer.experts is not None:
        delta, source = _run_beside(layer, layer.experts, ops, stream, delta), None
    return stream, _finish(delta, source, layer.gate_out_norm, layer.output_scale, ops)[0]


def _run_pieces(
    layer: Layer, forward: Forward, size: int, stream: Tensor, delta: Tensor, source: AnyProjection | None
) -> tuple[Tensor, Tensor]:
    """Do as `_run_gated` in pieces of tokens."""
    assert layer.gate_up is not None
    assert layer.down is not None

    def run(dropout: Dropout | None, stream: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return _run_gated(layer, forward.ops, dropout, stream, delta, None)

    adapters = *layer.gate_up.adapters.parameters, *layer.down.adapters.parameters
    parameters = *adapters, *list_parameters(layer.gate_norm, layer.gate_out_norm)
    result: tuple[Tensor, Tensor] = InPieces.apply(
        stream, delta, run, size, forward.dropout, source, layer.is_output_unread, *parameters
    )
    return result


def _run_experts(
    layer: Layer,
    experts: ExpertLayer,
    ops: ModuleType,
    dropout: Dropout | None,
    stream: Tensor,
    delta: Tensor,
    source: AnyProjection | None,
) -> tuple[Tensor, Tensor]:
    """Return the stream with delta added, and what its routed and shared experts add to it."""
    if layer.gate_norm is None:
        stream = normed = stream + delta
    else:
        stream, normed = AddNorm.apply(stream, delta, source, layer.gate_norm, ops)
    delta = run_experts(experts, normed, ops)
    if layer.gate_up is not None and layer.down is not None:
        gate_up = Project.apply(normed, layer.gate_up, ops, dropout, *layer.gate_up.adapters.parameters)
        with nullcontext() if experts.shared_gate is None else output_wanted():
            shared = _gated_project(layer, layer.gate_up, layer.down, ops, dropout, gate_up)
        if experts.shared_gate is not None:
            shared = torch.sigmoid(experts.shared_gate(normed)) * shared
        delta = delta + shared
    return stream, _finish(delta, None, layer.gate_out_norm, layer.output_scale, ops)[0]


def _run_beside(layer: Layer, experts: ExpertLayer, ops: ModuleType, stream: Tensor, delta: Tensor) -> Tensor:
    """Return what the gated layer gave, normed, and with it what the routed experts beside it give."""
    dense_norm, input_norm, output_norm = layer.expert_norms
    normed = OutputNorm.apply(stream, None, input_norm, ops)
    routed = run_experts(experts, normed, ops, routed_by=stream)
    result: Tensor = OutputNorm.apply(delta, layer.down, dense_norm, ops)
    return result + OutputNorm.apply(routed, None, output_norm, ops)


def _gated_project(
    layer: Layer,
    gate_up: AnyProjection,
    down: AnyProjection,
    ops: ModuleType,
    dropout: Dropout | None,
    values: Tensor,
) -> Tensor:
    """Return the last product of a gated layer."""
    parameters = down.adapters.parameters
    result: Tensor = GatedProject.apply(values, gate_up, layer.activation, down, ops, dropout, *parameters)
    return result


def _run_layer_input(
    part: LayerInput, activation: str, stream: Tensor, own_input: Tensor, ops: ModuleType, dropout: Dropout | None
) -> Tensor:
    """Return what a layer's own input adds to the stream."""
    gate = Project.apply(stream, part.gate, ops, dropout, *part.gate.adapters.parameters)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    output = Project.apply(active * own_input, part.output, ops, dropout, *part.output.adapters.parameters)
    result: Tensor = OutputNorm.apply(output, part.output, part.norm, ops)
    return result


def _normed_project(
    norm: Norm | None,
    projection: AnyProjection,
    ops: ModuleType,
    dropout: Dropout | None,
    stream: Tensor,
    delta: Tensor | None,
    source: AnyProjection | None,
) -> tuple[Tensor, Tensor]:
    """Return the stream with delta added, and the projection of its norm; of itself where there is none (OLMo 2)."""
    parameters = projection.adapters.parameters
    if norm is not None:
        result: tuple[Tensor, Tensor] = NormProject.apply(
            stream, delta, source, norm, projection, ops, dropout, *parameters, *norm.parameters
        )
        return result
    stream = stream if delta is None else stream + delta
    return stream, Project.apply(stream, projection, ops, dropout, *parameters)


def _finish(
    delta: Tensor, source: AnyProjection | None, norm: Norm | None, scale: float, ops: ModuleType
) -> tuple[Tensor, AnyProjection | None]:
    """Return what joins the stream, and the projection that made it, None where there is something in between."""
    if norm is not None:
        delta, source = OutputNorm.apply(delta, source, norm, ops, *norm.parameters), None
    if scale == 1.0:
        return delta, source
    return (delta * scale if source is None else Scale.apply(delta, source, scale)), None


def attend_scaled(
    attend: Attention,
    factors: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with queries that are multiplied by a factor a token [T, 1, 1]."""
    return attend(queries * factors, keys, values, segments, scale=scale, window=window, sinks=sinks)
