"""One layer of the decoder: what it is made of, and its forward pass.

Dimensions: `T` tokens of a flat batch (examples end to end), `H` hidden size.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from tasks.decoder.attention import Attention, Segments
from tasks.decoder.blocks import GatedProject, Norm, NormProject, OutputNorm, Project, Rotate, Select
from tasks.decoder.dropout import Dropout
from tasks.decoder.elementwise import Heads
from tasks.decoder.further_blocks import RowNorms, Scale
from tasks.decoder.projections import AnyProjection


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    input_norm: Norm | None
    qkv: AnyProjection
    heads: Heads
    head_norms: tuple[Norm, Norm] | None
    """Of queries and keys."""
    norms_rows: bool
    """The head norms take all heads of a token together."""
    rope: str
    """Which of the model's angles: the layer's type, "" where there is one for all, or `NO_ROTATION`."""
    window: int | None
    attention_scale: float
    output: AnyProjection
    attention_out_norm: Norm | None
    """Before the attention's output joins the stream (Gemma)."""
    gate_norm: Norm | None
    gate_up: AnyProjection
    activation: str
    down: AnyProjection
    gate_out_norm: Norm | None
    output_scale: float = 1.0
    """Of what the attention and the gated layer add to the stream."""

    @property
    def projections(self) -> tuple[AnyProjection, ...]:
        """All four groups."""
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def is_output_direct(self) -> bool:
        """The last product joins the stream as it is."""
        return self.gate_out_norm is None and self.output_scale == 1.0


def run_layer(
    layer: Layer,
    ops: ModuleType,
    dropout: Dropout | None,
    attend: Attention,
    segments: Segments,
    cos: Tensor,
    sin: Tensor,
    select: Tensor | None,
    stream: Tensor,
    delta: Tensor | None,
    source: AnyProjection | None,
    key: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the stream after the attention, and what the gated layer adds to it.

    Args:
        layer: its parts.
        ops: of the work between the products.
        dropout: of the adapter.
        attend: the attention.
        segments: the examples' borders.
        cos: of the positions' angles.
        sin: likewise.
        select: the only positions that are wanted; None: all.
        stream: [T, H]
        delta: [T, H], added first.
        source: the projection that made delta.
        key: of dropout, for `checkpoint` alone: it refuses to run the layer again once an argument has changed.
    """
    stream, qkv = _normed_project(layer.input_norm, layer.qkv, ops, dropout, stream, delta, source)
    norms = layer.head_norms or (None, None)
    if layer.head_norms is not None and layer.norms_rows:
        qkv = RowNorms.apply(qkv, layer.qkv, layer.heads, layer.head_norms, ops)
        queries, keys, values = Rotate.apply(qkv, None, layer.heads, cos, sin, (None, None), ops)
    else:
        queries, keys, values = Rotate.apply(qkv, layer.qkv, layer.heads, cos, sin, norms, ops)
    attended = attend(queries, keys, values, segments, scale=layer.attention_scale, window=layer.window).flatten(1)
    if select is not None:
        stream, attended = Select.apply(stream, attended, select)
    delta = Project.apply(attended, layer.output, ops, dropout, *layer.output.adapters.parameters)
    delta, source = _finish(delta, layer.output, layer.attention_out_norm, layer.output_scale, ops)
    stream, gate_up = _normed_project(layer.gate_norm, layer.gate_up, ops, dropout, stream, delta, source)
    parameters = layer.down.adapters.parameters
    delta = GatedProject.apply(gate_up, layer.gate_up, layer.activation, layer.down, ops, dropout, *parameters)
    delta, _ = _finish(delta, layer.down, layer.gate_out_norm, layer.output_scale, ops)
    return stream, delta


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
