"""Recognizes the models that the fused decoder can run, and builds its layers from their modules."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tasks.decoder.adapters import Part
from tasks.decoder.attention import find_attentions
from tasks.decoder.blocks import Norm
from tasks.decoder.decoder import Decoder, choose_operations
from tasks.decoder.dropout import Dropout, number_site
from tasks.decoder.elementwise import Heads
from tasks.decoder.known_layers import KNOWN_LAYERS, NO_ROTATION, KnownLayer
from tasks.decoder.layer import Layer
from tasks.decoder.projections import AnyProjection, Projection, build_projection

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Widest row that a kernel's program holds at once.
_MAX_HIDDEN = 16384


class UnknownDecoderError(ValueError):
    """The model, or its adapter, has something that the fused decoder does not do; the message says what."""


def recognize_decoder(model: PeftModel) -> Decoder:
    """Put a decoder together from a model's modules; their linear weights then lie in joint matrices.

    The model keeps working as before.

    Args:
        model: on its device, all frozen weights in one dtype.

    Raises:
        UnknownDecoderError: something is not known; the model is then unchanged.
    """
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    inner: Any = getattr(base, "model", None)
    inner = getattr(inner, "language_model", inner)  # of a composite: its text part
    layers = list(getattr(inner, "layers", ()))
    unknown = sorted({type(layer).__name__ for layer in layers} - KNOWN_LAYERS.keys())
    if unknown or not layers:
        raise UnknownDecoderError(f"it has layers that are not known ({', '.join(unknown) or 'none are found'})")
    _check_settings(config)
    _check_trained(model, inner.layers)
    share = _read_dropout(model)
    activation = _ACTIVATIONS[getattr(config, "hidden_act", None) or config.hidden_activation]
    plans = [
        _read_layer(layer, number, activation) for number, layer in enumerate(layers)
    ]  # all of them, before the first weight moves
    embedding = base.get_input_embeddings()
    dtype, device = embedding.weight.dtype, embedding.weight.device
    decoder_layers = tuple(plan() for plan in plans)
    known = KNOWN_LAYERS[type(layers[0]).__name__]
    return Decoder(
        embed=_read_embedding(embedding, config),
        angles=_read_angles(inner.rotary_emb, decoder_layers[0].heads.size),
        layers=decoder_layers,
        norm=_read_norm(inner.norm, known, 1.0 / getattr(config, "logits_scaling", 1.0)),
        head=base.get_output_embeddings(),
        attend=find_attentions(device, dtype, decoder_layers[0].heads.size)[0],
        ops=choose_operations(device, dtype),
        scale_queries=_read_query_scale(config),
        dropout=Dropout(share, torch.zeros(1, dtype=torch.int64, device=device)) if share else None,
    )


def quantize_decoder(decoder: Decoder) -> Decoder:
    """Return a decoder with the layers' weights in float8; the given one, and the model, are left without theirs."""
    layers = []
    for layer in decoder.layers:
        layers.append(
            replace(
                layer,
                qkv=_quantize(layer.qkv),
                output=_quantize(layer.output),
                gate_up=_quantize(layer.gate_up),
                down=_quantize(layer.down),
            )
        )
    quantized = replace(decoder, layers=tuple(layers))
    quantized.refresh()
    return quantized


def _quantize(group: AnyProjection) -> AnyProjection:
    """Return a group with float8 weights; the given one lets go of its own."""
    from tasks.decoder.quantized import build_quantized_projection

    assert isinstance(group, Projection)
    quantized = build_quantized_projection(group.adapters.parts, group.site)
    group.release()
    return quantized


def _check_settings(config: Any) -> None:
    """Refuse what changes a layer's arithmetic."""
    wanted: dict[str, tuple[Any, ...]] = {
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (None, False),
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


def _check_trained(model: PeftModel, layers: nn.Module) -> None:
    """Refuse trained parameters that are not the plain LoRA matrices of the layers' linear modules."""
    inside = {id(parameter) for parameter in layers.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (
            id(parameter) in inside and name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
        ):
            reasons = {"lora_magnitude_vector": "DoRA is on: ", "modules_to_save": "modules_to_save is set: "}
            why = next((reason for part, reason in reasons.items() if part in name), "")
            raise UnknownDecoderError(f"{why}{name.removeprefix('base_model.model.')} is trained")


def _read_dropout(model: PeftModel) -> float:
    """Return the share that all adapters drop."""
    shares = {
        module.lora_dropout["default"].p if isinstance(module.lora_dropout["default"], nn.Dropout) else 0.0
        for module in model.modules()
        if isinstance(module, LoraLayer)
    }
    if len(shares) > 1:
        raise UnknownDecoderError(f"its adapters drop different shares ({', '.join(map(str, sorted(shares)))})")
    return float(shares.pop()) if shares else 0.0


def _read_layer(layer: Any, number: int, activation: str) -> Callable[[], Layer]:
    """Check a layer and return a function that builds it."""
    known = KNOWN_LAYERS[type(layer).__name__]
    attention, mlp = layer.self_attn, layer.mlp
    _check_modules(layer, known.modules)
    _check_modules(attention, known.attention_modules)
    qkv = [_read_part(attention, name) for name in known.qkv]
    output = [_read_part(attention, "o_proj")]
    gate_up = [_read_part(mlp, name) for name in known.gate_up]
    down = [_read_part(mlp, "down_proj")]
    sites = [number_site(number, name) for name in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    heads = _read_heads(attention, known)

    def norm(name: str | None) -> Norm | None:
        return None if name is None else _read_norm(getattr(layer, name), known)

    def build() -> Layer:
        head_norms = [_read_norm(getattr(attention, name), known) for name in known.head_norms or ()]
        return Layer(
            input_norm=norm(known.input_norm),
            qkv=build_projection(qkv, sites[0]),
            heads=heads,
            head_norms=(head_norms[0], head_norms[1]) if head_norms else None,
            norms_rows=known.norms_rows,
            rope=known.rope(attention),
            window=known.window(attention),
            attention_scale=float(attention.scaling),
            output=build_projection(output, sites[1]),
            attention_out_norm=norm(known.attention_out_norm),
            gate_norm=norm(known.gate_norm),
            gate_up=build_projection(gate_up, sites[2]),
            activation=activation,
            down=build_projection(down, sites[3]),
            gate_out_norm=norm(known.gate_out_norm),
            output_scale=float(getattr(layer, "residual_multiplier", 1.0)),
        )

    return build


def _check_modules(module: nn.Module, wanted: set[str]) -> None:
    """Refuse a module that has other modules than its family's."""
    found = {name for name, _ in module.named_children()}
    if found != wanted:
        differs = ", ".join(sorted(found ^ wanted))
        raise UnknownDecoderError(f"its {type(module).__name__} has other modules than is known: {differs}")


def _read_heads(attention: Any, known: KnownLayer) -> Heads:
    """Return the layout of a row of queries, keys and values, of which the output's width gives the queries'."""
    size = attention.head_dim
    num_query = attention.o_proj.in_features // size
    num_rows = sum(getattr(attention, name).out_features for name in known.qkv) // size
    return Heads(num_query, (num_rows - num_query) // 2, size, known.is_interleaved, known.norms_after_rotation)


def _read_part(parent: nn.Module, name: str) -> Part:
    """Return a linear layer with its adapter, if it has one.

    Raises:
        UnknownDecoderError: it is something else, or its adapter does more than s B A x.
    """
    module: Any = getattr(parent, name)
    if type(module) is nn.Linear:
        return Part(module, None, None, 0.0)
    if not isinstance(module, LoraLayer) or type(module.base_layer) is not nn.Linear:
        raise UnknownDecoderError(f"its {name} is a {type(module).__name__}")
    if list(module.lora_A) != ["default"] or module.merged or any(module.use_dora.values()):
        raise UnknownDecoderError(f"the adapter of its {name} is not one plain LoRA")
    if type(module.lora_dropout["default"]) not in (nn.Identity, nn.Dropout):
        raise UnknownDecoderError(f"the dropout of its {name} is a {type(module.lora_dropout['default']).__name__}")
    lora_a: Any = module.lora_A["default"].weight
    lora_b: Any = module.lora_B["default"].weight
    return Part(module.base_layer, lora_a, lora_b, float(module.scaling["default"]))


def _read_norm(module: Any, known: KnownLayer, factor: float = 1.0) -> Norm:
    """Return an RMS norm, its weight times a factor."""
    weight = module.weight.detach()
    wide = weight if weight.dtype == torch.float64 else weight.float()
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm((1.0 + wide if known.is_weight_less_one else wide) * factor, float(eps))


def _read_embedding(embedding: nn.Module, config: Any) -> Callable[[Tensor], Tensor]:
    """Return the embedding; Granite's is multiplied."""
    factor = getattr(config, "embedding_multiplier", 1.0)
    return embedding if factor == 1.0 else lambda input_ids: embedding(input_ids) * factor


def _read_query_scale(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the factors by which queries grow with the position (Ministral 3); None where there are none."""
    rope = getattr(config, "rope_parameters", None) or {}
    beta = rope.get("llama_4_scaling_beta")
    if beta is None:
        return None
    start = rope["original_max_position_embeddings"]
    return lambda positions: 1.0 + beta * torch.log(1.0 + torch.floor(positions / start))


def _read_angles(rotary: nn.Module, size: int) -> Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]:
    """Return the model's rotary angles as cos and sin [T, R / 2]; the model's own module makes them."""

    def compute(states: Tensor, positions: Tensor, rope: str) -> tuple[Tensor, Tensor]:
        if rope == NO_ROTATION:
            cos = states.new_ones(len(positions), size // 2)
            return cos, torch.zeros_like(cos)
        cos, sin = rotary(states[None], positions[None], rope) if rope else rotary(states[None], positions[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    return compute
