"""What a layer does between its first two groups of products: it mixes the tokens of an example with those before them.

Dimensions: `T` tokens of a flat batch (examples end to end), `D` head size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder import elementwise, mixer_elementwise
from tasks.decoder.adapters import Part
from tasks.decoder.attention import LARGEST_HEAD, Segments
from tasks.decoder.blocks import Rotate
from tasks.decoder.delta_rule import DeltaRule
from tasks.decoder.elementwise import Heads
from tasks.decoder.forward import Forward
from tasks.decoder.further_blocks import RowNorms
from tasks.decoder.latent_attention import LatentAttention, attend_latent
from tasks.decoder.mixer_blocks import DeltaLayout, GateNorm, HeadLayout, SplitDelta, SplitHeads
from tasks.decoder.norms import Norm, list_parameters
from tasks.decoder.projections import AnyProjection
from tasks.decoder.wide_attention import attend_wide

KeysValues = tuple[Tensor, Tensor]
"""[T, heads, D] each"""


@dataclass(frozen=True)
class SelfAttention:
    """Attention to the tokens before, as Llama's."""

    heads: Heads
    head_norms: tuple[Norm, Norm] | None
    """Of queries and keys."""
    norms_rows: bool
    """The head norms take all heads of a token together."""
    rope: str
    """Which of the model's angles: the layer's type, "" where there is one for all, or `NO_ROTATION`."""
    window: int | None
    scale: float
    sinks: Tensor | None = None
    """[num_query]: see `sinks`."""


@dataclass(frozen=True)
class FurtherAttention:
    """Attention whose heads are laid out, normed, gated or shared in other ways."""

    layout: HeadLayout
    num_key_value: int
    """Heads of keys, the layer's own or another's."""
    norms: tuple[Norm | None, Norm | None, Norm | None]
    """Of queries, keys and values."""
    rope: str
    window: int | None
    scale: float
    keeps: str = ""
    """Name under which later layers find its keys and values; "": none do."""
    reads: str = ""
    """Name of the keys and values that it attends to in place of its own."""


@dataclass(frozen=True)
class DeltaNet:
    """A gated DeltaNet (Yang, Kautz and Hatamizadeh, 2025)."""

    layout: DeltaLayout
    weights: tuple[Tensor, Tensor, Tensor]
    """[C, W] fp32 of the convolutions of queries, keys and values."""
    rate: Tensor
    """[heads] fp32, -exp(A_log): what the decay's step is multiplied with."""
    step_bias: Tensor
    """[heads] fp32"""
    norm: Norm
    """Of each head of the output, before its gate."""
    beta_scale: float = 1.0


Mixer = SelfAttention | FurtherAttention | LatentAttention | DeltaNet


@dataclass(frozen=True)
class MixerPlan:
    """A mixer that was checked, and can be built."""

    inputs: list[Part]
    output: list[Part]
    build: Callable[[], Mixer]
    can_learn: bool = False
    """Whether weights of its own can be trained."""


class Mixed(NamedTuple):
    """What a mixer gives."""

    values: Tensor
    """[T, width]"""
    kept: KeysValues | None = None
    """For later layers."""


def mix(mixer: Mixer, rows: Tensor, source: AnyProjection, forward: Forward, shared: KeysValues | None) -> Mixed:
    """Mix the tokens of each example.

    Args:
        mixer: what does it.
        rows: [T, O], the joint product of the layer's first group.
        source: that group.
        forward: of the forward pass.
        shared: the keys and values that `mixer.reads` names.
    """
    if isinstance(mixer, DeltaNet):
        return Mixed(_run_delta_net(mixer, rows, source, forward))
    if isinstance(mixer, LatentAttention):
        return Mixed(attend_latent(mixer, rows, source, forward))
    if isinstance(mixer, FurtherAttention):
        return _attend_further(mixer, rows, source, forward, shared)
    cos, sin = forward.angles[mixer.rope]
    norms = mixer.head_norms or (None, None)
    trained = list_parameters(*norms)
    if mixer.head_norms is not None and mixer.norms_rows:
        rows = RowNorms.apply(rows, source, mixer.heads, mixer.head_norms, forward.ops, *trained)
        queries, keys, values = Rotate.apply(rows, None, mixer.heads, cos, sin, (None, None), forward.ops)
    else:
        queries, keys, values = Rotate.apply(rows, source, mixer.heads, cos, sin, norms, forward.ops, *trained)
    attended = forward.attend(
        queries, keys, values, forward.segments, scale=mixer.scale, window=mixer.window, sinks=mixer.sinks
    )
    return Mixed(attended.flatten(1))


def _attend_further(
    mixer: FurtherAttention, rows: Tensor, source: AnyProjection, forward: Forward, shared: KeysValues | None
) -> Mixed:
    cos, sin = forward.angles[mixer.rope]
    ops = find_mixer_operations(forward.ops)
    queries, gates, keys, values = SplitHeads.apply(rows, source, mixer.layout, cos, sin, mixer.norms, ops)
    if mixer.reads:
        assert shared is not None
        keys, values = shared
    attend = forward.attend if mixer.layout.size <= LARGEST_HEAD else attend_wide
    attended = attend(queries, keys, values, forward.segments, scale=mixer.scale, window=mixer.window)
    if gates is not None:
        attended = attended * torch.sigmoid(gates)
    return Mixed(attended.flatten(1), (keys, values) if mixer.keeps else None)


def _run_delta_net(net: DeltaNet, rows: Tensor, source: AnyProjection, forward: Forward) -> Tensor:
    ops = find_mixer_operations(forward.ops)
    split = SplitDelta.apply(rows, source, net.layout, net.weights, forward.positions, ops)
    mixed, gates = _apply_rule(net, split, forward.delta_rule, forward.segments)
    result: Tensor = GateNorm.apply(mixed, gates, net.norm, ops)
    return result


def run_delta_net(net: DeltaNet, rows: Tensor, rule: DeltaRule, segments: Segments, ops: ModuleType) -> Tensor:
    """Mix the joint product [T, O] of a net that is a module of a model; where its own weights are trained, they too.

    Args:
        net: as it is now.
        rows: [T, O]
        rule: the delta rule.
        segments: the examples' borders.
        ops: of the work between the products.
    """
    layout, mixer_ops, positions = net.layout, find_mixer_operations(ops), segments.positions
    if not any(weight.requires_grad for weight in (*net.weights, net.norm.weight)):
        split = SplitDelta.apply(rows, None, layout, net.weights, positions, mixer_ops)
        mixed, gates = _apply_rule(net, split, rule, segments)
        result: Tensor = GateNorm.apply(mixed, gates, net.norm, mixer_ops)
        return result
    sizes = layout.key_size, layout.key_size, layout.value_size
    convolve = mixer_elementwise.convolve
    heads = [
        convolve(rows, columns, weight, positions).unflatten(-1, (-1, size))
        for columns, weight, size in zip(layout.convolved, net.weights, sizes, strict=True)
    ]
    gates = rows[:, layout.gates].unflatten(-1, (-1, layout.value_size))
    mixed, gates = _apply_rule(net, (*heads, gates, rows[:, layout.beta], rows[:, layout.decay]), rule, segments)
    return mixer_elementwise.gate_norm(mixed, gates, net.norm.weight, net.norm.eps).flatten(1)


def _apply_rule(net: DeltaNet, split: tuple[Tensor, ...], rule: DeltaRule, segments: Segments) -> tuple[Tensor, Tensor]:
    """Return what the delta rule gives, and its gates."""
    queries, keys, values, gates, beta, step = split
    wide = torch.float64 if step.dtype == torch.float64 else torch.float32
    log_decay = net.rate * F.softplus(step.to(wide) + net.step_bias)
    beta = torch.sigmoid(beta.to(wide)) * net.beta_scale
    return rule(queries, keys, values, log_decay, beta, segments), gates


def name_shared(mixer: Mixer) -> tuple[str, str]:
    """Return the names under which a layer keeps keys and values, and finds another's; "" where it does not."""
    return (mixer.keeps, mixer.reads) if isinstance(mixer, FurtherAttention) else ("", "")


def list_attentions(mixers: Iterable[Mixer]) -> dict[Heads, list[int | None]]:
    """Return the heads of those that attend, keys and values of other layers included, with their windows."""
    found: dict[Heads, list[int | None]] = {}
    for mixer in mixers:
        if isinstance(mixer, FurtherAttention):
            heads = Heads(mixer.layout.num_query, mixer.num_key_value, mixer.layout.size)
            found.setdefault(heads, []).append(mixer.window)
        elif isinstance(mixer, LatentAttention):
            found.setdefault(Heads(mixer.heads.num, mixer.heads.num, mixer.heads.size), []).append(None)
        elif isinstance(mixer, SelfAttention):
            found.setdefault(mixer.heads, []).append(mixer.window)
    return found


def list_inner(mixer: Mixer) -> tuple[AnyProjection, ...]:
    """Return the groups of linear layers that a mixer has inside."""
    return mixer.projections if isinstance(mixer, LatentAttention) else ()


def has_sinks(mixers: Iterable[Mixer]) -> bool:
    """Say whether some of them attend with sinks."""
    return any(isinstance(mixer, SelfAttention) and mixer.sinks is not None for mixer in mixers)


def find_flash_size(attentions: Iterable[Heads]) -> int:
    """Return the largest size of heads that are not too large for FlashAttention; 0 without any."""
    return max((heads.size for heads in attentions if heads.size <= LARGEST_HEAD), default=0)


@cache
def find_mixer_operations(ops: ModuleType) -> ModuleType:
    """Return the mixers' operations that go with the layers' `elementwise` or `kernels`."""
    if ops is elementwise:
        return mixer_elementwise
    from tasks.decoder import mixer_kernels

    return mixer_kernels
