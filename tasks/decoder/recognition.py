"""Recognizes the models that the fused decoder can run, and builds its layers from their modules."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from tasks.decoder.adapters import Part
from tasks.decoder.attention import find_attentions
from tasks.decoder.decoder import Decoder, choose_operations
from tasks.decoder.delta_rule import find_delta_rules
from tasks.decoder.divided import DividedLayers
from tasks.decoder.dropout import Dropout, number_site
from tasks.decoder.expert_recognition import find_shared, read_experts
from tasks.decoder.head import Head
from tasks.decoder.known_layers import KNOWN_LAYERS, KnownLayer
from tasks.decoder.layer import Layer, LayerInput
from tasks.decoder.layer_inputs import LayerInputs
from tasks.decoder.mixer_recognition import plan_mixer
from tasks.decoder.mixers import find_flash_size, list_attentions
from tasks.decoder.module_reading import UnknownDecoderError as UnknownDecoderError
from tasks.decoder.module_reading import check_modules, read_norm, read_part
from tasks.decoder.norms import Norm
from tasks.decoder.outer_parts import read_angles, read_embedding, read_query_scale
from tasks.decoder.projections import build_projection
from tasks.decoder.weights import TrainedWeights

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Widest row that a kernel's program holds at once.
_MAX_HIDDEN = 16384


def recognize_decoder(model: Any, dtype: torch.dtype | None = None, *, divided: DividedLayers | None = None) -> Decoder:
    """Put a decoder together from a model's modules; their linear weights then lie in joint matrices.

    The model keeps working as before.

    Args:
        model: on its device, all frozen weights in one dtype: with an adapter, or with weights of its own that are
            trained.
        dtype: of the products; the frozen weights' where there is an adapter.
        divided: takes the layers of a model with an adapter, which need not be on the device yet, one by one; all else
            of the model goes to the device whole.

    Raises:
        UnknownDecoderError: something is not known; the model is then unchanged.
    """
    is_adapted = isinstance(model, PeftModel)
    base: Any = model.get_base_model() if is_adapted else model
    config = base.config.get_text_config()
    inner: Any = getattr(base, "model", None)
    inner = getattr(inner, "language_model", getattr(inner, "text_model", inner))  # of a composite: its text part
    layers = list(getattr(inner, "layers", ()))
    unknown = sorted({type(layer).__name__ for layer in layers} - KNOWN_LAYERS.keys())
    if unknown or not layers:
        raise UnknownDecoderError(f"it has layers that are not known ({', '.join(unknown) or 'none are found'})")
    _check_settings(config)
    own_inputs = getattr(inner, "per_layer_model_projection", None)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    dtype, device = dtype or embedding.weight.dtype, embedding.weight.device if divided is None else divided.device
    weights = None if is_adapted else TrainedWeights(dtype)
    if is_adapted:
        _check_trained(model, [inner.layers] if own_inputs is None else [inner.layers, own_inputs])
    else:
        _check_own(model, layers, (embedding, inner.norm, head))
    share = _read_dropout(model)
    plans = _plan_layers(layers, config, weights)  # all of them, before the first weight moves
    build_inputs = None if own_inputs is None else _read_layer_inputs(inner)
    embed = read_embedding(embedding, config, weights)
    decoder_layers = tuple(plan() for plan in plans) if divided is None else _divide(model, layers, config, divided)
    known = KNOWN_LAYERS[type(layers[0]).__name__]
    attentions = list_attentions(layer.mixer for layer in decoder_layers)
    decoder = Decoder(
        embed=embed,
        angles=read_angles(inner.rotary_emb, find_flash_size(attentions), known),
        layers=decoder_layers,
        norm=read_norm(
            inner.norm,
            weights,
            is_weight_less_one=known.is_weight_less_one,
            factor=getattr(config, "logits_scaling", 1.0) ** (1.0 if known.multiplies_logits else -1.0),
        ),
        head=Head(head, getattr(config, "final_logit_softcapping", None), weights),
        attend=find_attentions(device, dtype, find_flash_size(attentions))[0],
        ops=choose_operations(device, dtype),
        scale_queries=read_query_scale(config),
        dropout=Dropout(share, torch.zeros(1, dtype=torch.int64, device=device)) if share else None,
        delta_rule=find_delta_rules(device, dtype)[0],
        layer_inputs=None if build_inputs is None else build_inputs(),
        weights=weights,
        divided=divided,
    )
    if weights is not None:
        weights.check(model)
    return decoder


def _divide(model: nn.Module, layers: list[Any], config: Any, divided: DividedLayers) -> tuple[Layer, ...]:
    """Bring a model to its device, of each layer this rank's share alone; return the layers."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(divided.device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(divided.device))

    def build(number: int) -> Layer:
        # Planned anew: the first plan may hold what was in the host's memory.
        return _read_layer(layers[number], number, _find_activation(config), None)()

    built = tuple(divided.take(layer, partial(build, number)) for number, layer in enumerate(layers))
    divided.finish()
    return built


def _check_settings(config: Any) -> None:
    """Refuse what changes a layer's arithmetic."""
    wanted: dict[str, tuple[Any, ...]] = {
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (None, False, "vision"),
        "clip_qkv": (None,),
        "attention_dropout": (None, 0, 0.0),
        "residual_dropout": (None, 0, 0.0),
        "resid_pdrop": (None, 0, 0.0),
    }
    for name, values in wanted.items():
        if getattr(config, name, None) not in values:
            raise UnknownDecoderError(f"its {name} is {getattr(config, name)!r}")
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in _ACTIVATIONS:
        raise UnknownDecoderError(f"its activation is {activation!r}")
    if config.hidden_size > _MAX_HIDDEN:
        raise UnknownDecoderError(f"its hidden size is {config.hidden_size}, above {_MAX_HIDDEN}")


def _check_trained(model: PeftModel, places: list[nn.Module]) -> None:
    """Refuse trained parameters that are not the plain LoRA matrices of the linear modules at some places."""
    inside = {id(parameter) for place in places for parameter in place.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (
            id(parameter) in inside and name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
        ):
            reasons = {"lora_magnitude_vector": "DoRA is on: ", "modules_to_save": "modules_to_save is set: "}
            why = next((reason for part, reason in reasons.items() if part in name), "")
            raise UnknownDecoderError(f"{why}{name.removeprefix('base_model.model.')} is trained")


def _check_own(model: nn.Module, layers: Sequence[nn.Module], others: Sequence[nn.Module]) -> None:
    """Refuse a trained parameter that is neither of a layer nor the weight of another known module."""
    known = {id(parameter) for layer in layers for parameter in layer.parameters()}
    known |= {id(module.weight) for module in others}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise UnknownDecoderError(f"{name} is trained")


def _read_dropout(model: nn.Module) -> float:
    """Return the share that all adapters drop."""
    shares = {
        module.lora_dropout["default"].p if isinstance(module.lora_dropout["default"], nn.Dropout) else 0.0
        for module in model.modules()
        if isinstance(module, LoraLayer)
    }
    if len(shares) > 1:
        raise UnknownDecoderError(f"its adapters drop different shares ({', '.join(map(str, sorted(shares)))})")
    return float(shares.pop()) if shares else 0.0


def _plan_layers(layers: list[Any], config: Any, weights: TrainedWeights | None) -> list[Callable[[], Layer]]:
    """Check all layers; return a function for each that builds it."""
    activation = _find_activation(config)
    try:
        return [_read_layer(layer, number, activation, weights) for number, layer in enumerate(layers)]
    except (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        kind = type(layers[0]).__name__
        raise UnknownDecoderError(f"its {kind} is not made as is known ({type(error).__name__}: {error})") from error


def _find_activation(config: Any) -> str:
    return _ACTIVATIONS[getattr(config, "hidden_act", None) or config.hidden_activation]


def _read_layer(layer: Any, number: int, activation: str, weights: TrainedWeights | None) -> Callable[[], Layer]:
    """Check a layer and return a function that builds it."""
    known = KNOWN_LAYERS[type(layer).__name__]
    has_input = bool(getattr(layer, "hidden_size_per_layer_input", 0))
    mixer_name = "linear_attn" if hasattr(layer, "linear_attn") else "self_attn"
    expert_norms, further = _list_beside(layer, known)
    check_modules(layer, {mixer_name, *known.modules, *further, *(known.layer_input if has_input else ())})
    mixer = plan_mixer(layer, known, weights)
    experts = read_experts(layer if expert_norms else layer.mlp, known.experts, activation)
    learns = weights is not None and any(parameter.requires_grad for parameter in layer.parameters())
    if learns and (has_input or experts is not None or not mixer.can_learn):
        raise UnknownDecoderError(
            f"weights of its {type(layer).__name__} are trained, of which it trains adapters alone"
        )
    dense = layer.mlp if experts is None or expert_norms else find_shared(layer.mlp, known.experts)
    gate_up = [] if dense is None else [read_part(dense, name) for name in known.gate_up]
    down = [] if dense is None else [read_part(dense, "down_proj")]
    own_input = [[read_part(layer, name)] for name in known.layer_input[:2]] if has_input else []
    sites = [number_site(number, name) for name in ("q_proj", "o_proj", "gate_proj", "down_proj")]

    def norm(name: str | None) -> Norm | None:
        less_one = known.is_weight_less_one
        return None if name is None else read_norm(getattr(layer, name), weights, is_weight_less_one=less_one)

    def build() -> Layer:
        return Layer(
            input_norm=norm(known.input_norm),
            qkv=build_projection(mixer.inputs, sites[0], weights),
            mixer=mixer.build(),
            output=build_projection(mixer.output, sites[1], weights),
            attention_out_norm=norm(known.attention_out_norm),
            gate_norm=norm(known.gate_norm),
            gate_up=build_projection(gate_up, sites[2], weights) if gate_up else None,
            activation=activation,
            down=build_projection(down, sites[3], weights) if down else None,
            gate_out_norm=norm(known.gate_out_norm),
            output_scale=float(getattr(layer, "residual_multiplier", 1.0)),
            layer_input=_build_layer_input(layer, known, own_input, number) if has_input else None,
            stream_scale=float(layer.layer_scalar) if hasattr(layer, "layer_scalar") else None,
            experts=None if experts is None else experts(),
            expert_norms=tuple(read_norm(getattr(layer, name)) for name in expert_norms),
        )

    return build


def _list_beside(layer: Any, known: KnownLayer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the norms of experts beside a layer's dense part, and of all that these experts add to it."""
    if known.experts is None or not known.experts.norms or not hasattr(layer, "experts"):
        return (), ()
    return known.experts.norms, ("experts", known.experts.router, *known.experts.norms)


def _build_layer_input(layer: Any, known: KnownLayer, parts: list[list[Part]], number: int) -> LayerInput:
    gate, output = (
        build_projection(group, number_site(number, name))
        for group, name in zip(parts, known.layer_input, strict=False)
    )
    return LayerInput(gate, output, read_norm(getattr(layer, known.layer_input[2])))


def _read_layer_inputs(inner: Any) -> Callable[[], LayerInputs]:
    """Check what makes the layers' own inputs, and return a function that builds it."""
    parts = [read_part(inner, "per_layer_model_projection")]
    return lambda: LayerInputs(
        inner.embed_tokens_per_layer,
        build_projection(parts, number_site(0, "per_layer_model_projection")),
        float(inner.per_layer_model_projection_scale),
        read_norm(inner.per_layer_projection_norm),
        float(inner.per_layer_input_scale),
    )
