"""One layer of the decoder: what it is made of, and its forward pass.

Dimensions: `T` tokens of a flat batch (examples end to end), `H` hidden size.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder.attention import Attention, Segments
from tasks.decoder.blocks import GatedProject, Norm, NormProject, OutputNorm, Project, Select
from tasks.decoder.dropout import Dropout
from tasks.decoder.further_blocks import Scale
from tasks.decoder.mixers import Forward, KeysValues, Mixer, mix
from tasks.decoder.projections import AnyProjection


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
    gate_up: AnyProjection
    activation: str
    down: AnyProjection
    gate_out_norm: Norm | None
    output_scale: float = 1.0
    """Of what the mixer and the gated layer add to the stream."""
    layer_input: LayerInput | None = None
    stream_scale: Tensor | None = None
    """[1], of the stream that the layer gives."""

    @property
    def projections(self) -> tuple[AnyProjection, ...]:
        """All groups."""
        further = () if self.layer_input is None else (self.layer_input.gate, self.layer_input.output)
        return self.qkv, self.output, self.gate_up, self.down, *further

    @property
    def is_output_direct(self) -> bool:
        """The last product joins the stream as it is."""
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
    """
    ops, dropout = forward.ops, forward.dropout
    stream, rows = _normed_project(layer.input_norm, layer.qkv, ops, dropout, stream, delta, source)
    mixed, kept = mix(layer.mixer, rows, layer.qkv, forward, shared)
    if select is not None:
        stream, mixed = Select.apply(stream, mixed, select)
    delta = Project.apply(mixed, layer.output, ops, dropout, *layer.output.adapters.parameters)
    delta, source = _finish(delta, layer.output, layer.attention_out_norm, layer.output_scale, ops)
    stream, gate_up = _normed_project(layer.gate_norm, layer.gate_up, ops, dropout, stream, delta, source)
    parameters = layer.down.adapters.parameters
    delta = GatedProject.apply(gate_up, layer.gate_up, layer.activation, layer.down, ops, dropout, *parameters)
    delta, _ = _finish(delta, layer.down, layer.gate_out_norm, layer.output_scale, ops)
    if layer.layer_input is not None:
        assert own_input is not None
        stream = stream + delta
        own_input = own_input if select is None else own_input.index_select(0, select)
        delta = _run_layer_input(layer.layer_input, layer.activation, stream, own_input, ops, dropout)
    if layer.stream_scale is not None:
        return (stream + delta) * layer.stream_scale, None, kept
    return stream, delta, kept


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
            stream, delta, source, norm, projection, ops, dropout, *parameters
        )
        return result
    stream = stream if delta is None else stream + delta
    return stream, Project.apply(stream, projection, ops, dropout, *parameters)


def _finish(
    delta: Tensor, source: AnyProjection, norm: Norm | None, scale: float, ops: ModuleType
) -> tuple[Tensor, AnyProjection | None]:
    """Return what joins the stream, and the projection that made it, None where there is something in between."""
    if norm is not None:
        return OutputNorm.apply(delta, source, norm, ops), None
    return (delta, source) if scale == 1.0 else (Scale.apply(delta, source, scale), None)


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
) -> Tensor:
    """Attend with queries that are multiplied by a factor a token [T, 1, 1]."""
    return attend(queries * factors, keys, values, segments, scale=scale, window=window)
