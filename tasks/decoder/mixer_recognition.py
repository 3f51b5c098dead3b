"""Reads what mixes the tokens of a layer: attention, or a gated DeltaNet."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tasks.decoder.elementwise import Heads
from tasks.decoder.known_layers import KnownLayer
from tasks.decoder.latent_recognition import KNOWN_LATENT, plan_latent
from tasks.decoder.mixer_blocks import Columns, DeltaLayout, HeadLayout
from tasks.decoder.mixers import DeltaNet, FurtherAttention, Mixer, MixerPlan, SelfAttention
from tasks.decoder.module_reading import UnknownDecoderError, check_modules, read_norm, read_part
from tasks.decoder.norms import Norm
from tasks.decoder.weights import TrainedWeights


def plan_mixer(layer: nn.Module, known: KnownLayer, weights: TrainedWeights | None = None) -> MixerPlan:
    """Check what mixes the tokens of a layer.

    Args:
        layer: of the model.
        known: of its class.
        weights: of the decoder, where its own are trained.

    Raises:
        UnknownDecoderError: it is something else than its family's.
    """
    net: Any = getattr(layer, "linear_attn", None)
    if net is not None:
        return _plan_delta_net(net)
    attention: Any = layer.self_attn
    if type(attention).__name__ in _SHARING:
        return _plan_sharing(attention)
    if type(attention).__name__ in KNOWN_LATENT:
        return plan_latent(attention)
    has_norms = known.head_norms is not None and not (known.may_lack_norms and not hasattr(attention, "q_norm"))
    norm_names = known.head_norms if has_norms and known.head_norms else ()
    check_modules(attention, {*known.attention_modules, *norm_names})
    parts = [read_part(attention, name) for name in known.qkv]
    output = [read_part(attention, "o_proj")]
    heads = _read_heads(attention, known)

    def build() -> Mixer:
        norms = [read_norm(getattr(attention, name), weights, is_weight_less_one=known.is_weight_less_one)
                 for name in norm_names]  # fmt: skip
        rope, window, scale = known.rope(attention), known.window(attention), float(attention.scaling)
        if not known.has_gates and not (known.may_lack_norms and norms):
            pair = (norms[0], norms[1]) if norms else None
            sinks = attention.sinks.detach() if known.has_sinks else None
            return SelfAttention(heads, pair, known.norms_rows, rope, window, scale, sinks)
        layout = HeadLayout(heads.num_query, heads.num_key_value, heads.size, has_gates=known.has_gates)
        first, second = norms if norms else (None, None)
        return FurtherAttention(layout, heads.num_key_value, (first, second, None), rope, window, scale)

    return MixerPlan(parts, output, build, can_learn=not known.has_gates)


def _read_heads(attention: Any, known: KnownLayer) -> Heads:
    """Return the layout of a row of queries, keys and values, of which the output's width gives the queries'."""
    size = attention.head_dim
    num_query = attention.o_proj.in_features // size
    num_rows = sum(getattr(attention, name).out_features for name in known.qkv) // size
    num_rows -= num_query * (2 if known.has_gates else 1)
    return Heads(num_query, num_rows // 2, size, known.is_interleaved, known.norms_after_rotation)


_SHARING = {"Gemma4TextAttention", "Gemma4UnifiedTextAttention"}


def _plan_sharing(attention: Any) -> MixerPlan:
    """Check Gemma 4's attention: some layers have no keys and values, and some no values, of their own."""
    reads, size = bool(attention.is_kv_shared_layer), attention.head_dim
    has_values = not reads and attention.v_proj is not None
    names = ("q_proj",) if reads else ("q_proj", "k_proj", "v_proj") if has_values else ("q_proj", "k_proj")
    check_modules(attention, {*names, "o_proj", "q_norm", *(() if reads else ("k_norm", "v_norm"))})
    parts = [read_part(attention, name) for name in names]
    output = [read_part(attention, "o_proj")]
    num_query = attention.o_proj.in_features // size
    num_key_value = num_query // attention.num_key_value_groups

    def build() -> Mixer:
        norms: list[Norm | None] = [read_norm(attention.q_norm), None, None]
        if not reads:
            weight = torch.ones(size, dtype=norms[0].weight.dtype, device=norms[0].weight.device)  # type: ignore[union-attr]
            norms[1:] = [read_norm(attention.k_norm), Norm(weight, float(attention.v_norm.eps))]
        return FurtherAttention(
            HeadLayout(num_query, 0 if reads else num_key_value, size, values_are_keys=not reads and not has_values),
            num_key_value,
            (norms[0], norms[1], norms[2]),
            rope=attention.layer_type,
            window=attention.sliding_window,
            scale=float(attention.scaling),
            keeps=attention.layer_type if attention.store_full_length_kv else "",
            reads=attention.layer_type if reads else "",
        )

    return MixerPlan(parts, output, build)


@dataclass(frozen=True)
class KnownNet:
    """Names of a DeltaNet's modules, and where the parts of their joint product lie."""

    inputs: tuple[str, ...]
    output: str
    norm: str
    locate: Callable[[Any], tuple[Columns, ...]]
    """Columns of queries, keys, values, gates, beta and decay."""


def _cut(*sizes: int) -> list[slice]:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _locate_in_turn(net: Any) -> tuple[Columns, ...]:
    heads = net.num_v_heads
    return tuple(_cut(net.key_dim, net.key_dim, net.value_dim, net.value_dim, heads, heads))


def _locate_gates_last(net: Any) -> tuple[Columns, ...]:
    heads = net.num_v_heads
    queries, keys, values, decay, beta, gates = _cut(
        net.key_dim, net.key_dim, net.value_dim, heads, heads, net.value_dim
    )
    return queries, keys, values, gates, beta, decay


def _locate_by_key_head(net: Any) -> tuple[Columns, ...]:
    """Of Qwen3-Next: each key head's queries, keys, values and gates lie together."""
    groups = net.num_v_heads // net.num_k_heads
    width = groups * net.head_v_dim
    columns = torch.arange(2 * net.key_dim + 2 * net.value_dim).view(net.num_k_heads, -1)
    parts = [columns[:, part].flatten() for part in _cut(net.head_k_dim, net.head_k_dim, width, width)]
    scalars = columns.numel() + torch.arange(2 * net.num_v_heads).view(net.num_k_heads, -1)
    return *parts, *(scalars[:, part].flatten() for part in _cut(groups, groups))


_QWEN_INPUTS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_KNOWN_NETS = {
    "Qwen3_5GatedDeltaNet": KnownNet(_QWEN_INPUTS, "out_proj", "norm", _locate_in_turn),
    "Qwen3_5MoeGatedDeltaNet": KnownNet(_QWEN_INPUTS, "out_proj", "norm", _locate_in_turn),
    "Qwen3NextGatedDeltaNet": KnownNet(("in_proj_qkvz", "in_proj_ba"), "out_proj", "norm", _locate_by_key_head),
    "OlmoHybridGatedDeltaNet": KnownNet(
        ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj"), "o_proj", "o_norm", _locate_gates_last
    ),
}


def _plan_delta_net(net: Any) -> MixerPlan:
    """Check a gated DeltaNet."""
    known = find_known_net(net)
    parts = [read_part(net, name) for name in known.inputs]
    output = [read_part(net, known.output)]
    return MixerPlan(parts, output, lambda: build_delta_net(net, locate_parts(net)))


def find_known_net(net: Any) -> KnownNet:
    """Return what a gated DeltaNet is made of.

    Raises:
        UnknownDecoderError: it is not known.
    """
    known = _KNOWN_NETS.get(type(net).__name__)
    if known is None:
        raise UnknownDecoderError(f"its {type(net).__name__} is not known")
    check_modules(net, {*known.inputs, known.output, known.norm, "conv1d"})
    if net.activation not in ("silu", "swish") or net.conv1d.bias is not None:
        raise UnknownDecoderError(f"the convolution of its {type(net).__name__} has a bias or is not followed by silu")
    return known


def locate_parts(net: Any) -> DeltaLayout:
    """Return where the parts of a known DeltaNet's joint product lie."""
    device = net.A_log.device
    queries, keys, values, *further = find_known_net(net).locate(net)
    gates, beta, decay = (part if isinstance(part, slice) else part.to(device) for part in further)
    convolved = _number(queries, device), _number(keys, device), _number(values, device)
    sizes = net.num_k_heads, net.num_v_heads, net.head_k_dim, net.head_v_dim
    return DeltaLayout(*sizes, convolved, gates, beta, decay)


def build_delta_net(net: Any, layout: DeltaLayout) -> DeltaNet:
    """Return a known DeltaNet; what of it is trained keeps its gradient."""
    known = find_known_net(net)
    filters = _widen(net.conv1d.weight[:, 0])
    first, second, third = (filters[part].contiguous() for part in _cut(net.key_dim, net.key_dim, net.value_dim))
    norm = getattr(net, known.norm)
    return DeltaNet(
        layout,
        (first, second, third),
        rate=-_widen(net.A_log).exp(),
        step_bias=_widen(net.dt_bias),
        norm=Norm(_widen(norm.weight), float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)),
        beta_scale=2.0 if getattr(net, "allow_neg_eigval", False) else 1.0,
    )


def _number(columns: Columns, device: torch.device) -> Tensor:
    """Return the numbers of columns as int32."""
    numbers = torch.arange(columns.start, columns.stop) if isinstance(columns, slice) else columns
    return numbers.to(device, torch.int32)


def _widen(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
