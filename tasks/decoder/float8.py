"""A decoder's weights in float8, where their sizes allow it: what of it, and how many products are left."""

from dataclasses import replace
from functools import partial

from tasks.decoder.adapters import AdapterGroup
from tasks.decoder.decoder import Decoder
from tasks.decoder.experts import ExpertLayer
from tasks.decoder.grouped import AnyGrouped, GroupedProjection
from tasks.decoder.latent_attention import LatentAttention
from tasks.decoder.layer import Layer
from tasks.decoder.mixers import Mixer, list_inner
from tasks.decoder.module_reading import UnknownDecoderError
from tasks.decoder.projections import AnyProjection, Projection
from tasks.out_of_memory import is_out_of_memory

# Of both sides of a weight: what the float8 products of cuBLASLt take, which quantized.py calls.
_SIZE_STEP = 16
# Of two ways to multiply the same float8 numbers, with results in 16 bits.
_MOST_OFF = 0.01


def quantize_decoder(decoder: Decoder) -> Decoder:
    """Return a decoder with the layers' weights in float8; the given one, and the model, are left without theirs.

    One layer after the other: nothing lies twice but one layer's weights. A product whose sizes float8 does not allow
    stays as it is: see `has_float8_sizes`; those of routed experts take all sizes. Routers stay.
    """
    layers = []
    for number, layer in enumerate(decoder.layers):
        quantize = partial(quantize_layer, layer)
        layers.append(quantize() if decoder.divided is None else decoder.divided.replace(number, quantize))
    if decoder.divided is not None:
        decoder.divided.finish()
    quantized = replace(decoder, layers=tuple(layers))
    quantized.refresh()
    return quantized


def quantize_layer(layer: Layer) -> Layer:
    """Return a layer with its weights in float8; the given one is left without."""
    return replace(
        layer,
        qkv=_quantize(layer.qkv),
        mixer=_quantize_mixer(layer.mixer),
        output=_quantize(layer.output),
        gate_up=None if layer.gate_up is None else _quantize(layer.gate_up),
        down=None if layer.down is None else _quantize(layer.down),
        experts=None if layer.experts is None else _quantize_experts(layer.experts),
    )


def check_expert_products(decoder: Decoder) -> None:
    """Compare the float8 products of the first routed experts with those in plain PyTorch, on the decoder's device.

    Raises:
        UnknownDecoderError: they differ by more than 16 bits round.
    """
    from tasks.decoder.quantized_experts import measure_products

    number = next((number for number, layer in enumerate(decoder.layers) if layer.experts is not None), 0)
    experts = decoder.layers[number].experts
    if experts is not None and decoder.divided is not None:
        decoder.divided.hold(number)
    for projection in _list(experts):
        assert isinstance(projection, GroupedProjection)
        try:
            off = measure_products(projection)
        except Exception as error:  # a kernel that does not compile here raises what it likes
            if is_out_of_memory(error):
                raise
            raise UnknownDecoderError(
                f"its routed experts cannot be multiplied in FP8 here: {str(error).partition(chr(10))[0]}"
            ) from error
        if not off <= _MOST_OFF:
            raise UnknownDecoderError(f"FP8 products of its routed experts are off by {off:.2g} (limit {_MOST_OFF:g})")


def count_unquantized(decoder: Decoder) -> tuple[int, int]:
    """Return how many of the layers' products are not in float8, and how many there are."""
    groups = [
        group
        for layer in decoder.layers
        for group in (
            layer.qkv,
            *list_inner(layer.mixer),
            layer.output,
            layer.gate_up,
            layer.down,
            *_list(layer.experts),
        )
        if group is not None
    ]
    return sum(isinstance(group, Projection | GroupedProjection) for group in groups), len(groups)


def _list(experts: ExpertLayer | None) -> tuple[AnyGrouped, ...]:
    return () if experts is None else (experts.gate_up, experts.down)


def _quantize_experts(experts: ExpertLayer) -> ExpertLayer:
    """Return routed experts with float8 weights; the given ones are left without theirs."""
    from tasks.decoder.quantized_experts import quantize_experts

    assert isinstance(experts.gate_up, GroupedProjection)
    assert isinstance(experts.down, GroupedProjection)
    return replace(experts, gate_up=quantize_experts(experts.gate_up), down=quantize_experts(experts.down))


def _quantize_mixer(mixer: Mixer) -> Mixer:
    """Return a mixer with its own weights in float8, if it has some."""
    if not isinstance(mixer, LatentAttention):
        return mixer
    query = None if mixer.query is None else (mixer.query[0], _quantize(mixer.query[1]))
    return replace(mixer, query=query, key_value=(mixer.key_value[0], _quantize(mixer.key_value[1])))


def _quantize(group: AnyProjection) -> AnyProjection:
    """Return a group with float8 weights, and the given one lets go of its own; or the given one."""
    from tasks.decoder.quantized import build_quantized_projection

    assert isinstance(group, Projection)
    assert isinstance(group.adapters, AdapterGroup)
    if not has_float8_sizes(group.num_in, group.num_out):
        return group
    quantized = build_quantized_projection(group.adapters.parts, group.site)
    group.release()
    return quantized


def has_float8_sizes(num_in: int, num_out: int) -> bool:
    """Return whether float8 products take a weight [num_out, num_in]."""
    return num_in % _SIZE_STEP == 0 and num_out % _SIZE_STEP == 0
