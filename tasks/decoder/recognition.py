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
from tasks.decoder.decoder import Decoder, Layer, choose_operations
from tasks.decoder.dropout import Dropout, number_site
from tasks.decoder.elementwise import Heads
from tasks.decoder.projections import AnyProjection, Projection, build_projection

_FAMILIES = {
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Gemma3DecoderLayer",
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# The names of a layer's own modules: one more, and the layer is not what we think it is.
_LAYER_MODULES = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
}
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
    config = base.config
    inner: Any = getattr(base, "model", None)
    layers = list(getattr(inner, "layers", ()))
    if not layers or any(type(layer).__name__ not in _FAMILIES for layer in layers):
        raise UnknownDecoderError(f"its layers are not of a known family ({', '.join(sorted(_FAMILIES))})")
    _check_settings(config)
    _check_trained(model)
    share = _read_dropout(model)
    activation = _ACTIVATIONS[getattr(config, "hidden_act", None) or config.hidden_activation]
    plans = [
        _read_layer(layer, number, activation) for number, layer in enumerate(layers)
    ]  # all of them, before the first weight moves
    embedding = base.get_input_embeddings()
    dtype, device = embedding.weight.dtype, embedding.weight.device
    decoder_layers = tuple(plan() for plan in plans)
    return Decoder(
        embed=embedding,
        angles=_read_angles(inner.rotary_emb, by_type=type(layers[0]).__name__ == "Gemma3DecoderLayer"),
        layers=decoder_layers,
        norm=_read_norm(inner.norm),
        head=base.get_output_embeddings(),
        attend=find_attentions(device, dtype, decoder_layers[0].heads.size)[0],
        ops=choose_operations(device, dtype),
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
    }
    for name, values in wanted.items():
        if getattr(config, name, None) not in values:
            raise UnknownDecoderError(f"its {name} is {getattr(config, name)!r}")
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in _ACTIVATIONS:
        raise UnknownDecoderError(f"its activation is {activation!r}")
    if config.hidden_size > _MAX_HIDDEN:
        raise UnknownDecoderError(f"its hidden size is {config.hidden_size}, above {_MAX_HIDDEN}")


def _check_trained(model: PeftModel) -> None:
    """Refuse trained parameters that are not the plain LoRA matrices of the layers' linear modules."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (
            ".layers." in name and name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
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
    names = {name for name, _ in layer.named_children()}
    if not names <= _LAYER_MODULES:
        raise UnknownDecoderError(f"its layers have {', '.join(sorted(names - _LAYER_MODULES))}")
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [_read_part(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    output = [_read_part(attention, "o_proj")]
    gate_up = [_read_part(mlp, name) for name in ("gate_proj", "up_proj")]
    down = [_read_part(mlp, "down_proj")]
    sites = [number_site(number, name) for name in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    size = attention.head_dim
    heads = Heads(qkv[0].module.out_features // size, qkv[1].module.out_features // size, size)
    is_sandwich = hasattr(layer, "pre_feedforward_layernorm")
    window = getattr(attention, "sliding_window", None)
    if type(layer).__name__ == "MistralDecoderLayer":
        window = attention.config.sliding_window

    def build() -> Layer:
        return Layer(
            input_norm=_read_norm(layer.input_layernorm),
            qkv=build_projection(qkv, sites[0]),
            heads=heads,
            head_norms=(
                _read_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
                _read_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            ),
            rope=attention.layer_type if type(layer).__name__ == "Gemma3DecoderLayer" else "",
            window=window,
            attention_scale=float(attention.scaling),
            output=build_projection(output, sites[1]),
            attention_out_norm=_read_norm(layer.post_attention_layernorm) if is_sandwich else None,
            gate_norm=_read_norm(layer.pre_feedforward_layernorm if is_sandwich else layer.post_attention_layernorm),
            gate_up=build_projection(gate_up, sites[2]),
            activation=activation,
            down=build_projection(down, sites[3]),
            gate_out_norm=_read_norm(layer.post_feedforward_layernorm) if is_sandwich else None,
        )

    return build


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


def _read_norm(module: Any) -> Norm:
    """Return an RMS norm; Gemma's weight is stored less one."""
    weight = module.weight.detach()
    wide = weight if weight.dtype == torch.float64 else weight.float()
    if type(module).__name__.startswith("Gemma3"):
        return Norm(1.0 + wide, float(module.eps))
    return Norm(wide, float(module.variance_epsilon))


def _read_angles(rotary: nn.Module, *, by_type: bool) -> Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]:
    """Return the model's rotary angles as cos and sin [T, D / 2]; the model's own module makes them."""

    def compute(states: Tensor, positions: Tensor, rope: str) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(states[None], positions[None], rope) if by_type else rotary(states[None], positions[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    return compute
