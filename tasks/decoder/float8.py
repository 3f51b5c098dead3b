"""A decoder's weights in float8, where their sizes allow it: what of it, and how many products are left."""

from dataclasses import replace

from tasks.decoder.adapters import AdapterGroup
from tasks.decoder.decoder import Decoder
from tasks.decoder.latent_attention import LatentAttention
from tasks.decoder.mixers import Mixer, list_inner
from tasks.decoder.projections import AnyProjection, Projection

# Of both sides of a weight: what the float8 products of cuBLASLt take, which quantized.py calls.
_SIZE_STEP = 16


def quantize_decoder(decoder: Decoder) -> Decoder:
    """Return a decoder with the layers' weights in float8; the given one, and the model, are left without theirs.

    A product whose sizes float8 does not allow stays as it is: see `has_float8_sizes`.
    """
    layers = []
    for layer in decoder.layers:
        layers.append(
            replace(
                layer,
                qkv=_quantize(layer.qkv),
                mixer=_quantize_mixer(layer.mixer),
                output=_quantize(layer.output),
                gate_up=None if layer.gate_up is None else _quantize(layer.gate_up),
                down=None if layer.down is None else _quantize(layer.down),
            )
        )
    quantized = replace(decoder, layers=tuple(layers))
    quantized.refresh()
    return quantized


def count_unquantized(decoder: Decoder) -> tuple[int, int]:
    """Return how many of the layers' products are not in float8, and how many there are."""
    groups = [
        group
        for layer in decoder.layers
        for group in (layer.qkv, *list_inner(layer.mixer), layer.output, layer.gate_up, layer.down)
        if group is not None
    ]
    return sum(isinstance(group, Projection) for group in groups), len(groups)


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
