"""Decoder layers that the fused decoder knows: one row a class of transformers', with what differs from Llama's.

A layer must have exactly the modules that its row names. Whether a row is right is proven at each start of a training:
loss and gradients are compared with the model's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

NO_ROTATION = "none"
"""Name of the angles of a layer that does not rotate its heads."""

Window = Callable[[Any], int | None]
Rope = Callable[[Any], str]


def _own_window(attention: Any) -> int | None:
    window: int | None = getattr(attention, "sliding_window", None)
    return window


def _config_window(attention: Any) -> int | None:
    """Of families whose layers all have the config's."""
    window: int | None = attention.config.sliding_window
    return window


def _hybrid_window(attention: Any) -> int | None:
    """Of EXAONE 4, whose full layers keep the number and do not use it."""
    window: int | None = attention.sliding_window if attention.is_sliding else None
    return window


def _no_window(attention: Any) -> None:
    """Of PaddleOCR-VL, whose layers keep the number, and whose mask has no window."""


def _one_rope(attention: Any) -> str:
    return ""


def _rope_by_type(attention: Any) -> str:
    return str(attention.config.layer_types[attention.layer_idx])


def _rope_where_asked(attention: Any) -> str:
    return "" if attention.use_rope else NO_ROTATION


def _rope_where_set(attention: Any) -> str:
    """Of OLMo Hybrid, which has positions only where its config has angles."""
    return "" if (attention.config.rope_parameters or {}).get("rope_theta") is not None else NO_ROTATION


def _rope_where_sliding(attention: Any) -> str:
    """Of EXAONE 4: the full layers of a model that has sliding ones do not rotate."""
    return "" if attention.sliding_window is None or attention.is_sliding else NO_ROTATION


@dataclass(frozen=True)
class KnownExperts:
    """The modules of a block of routed experts beside `experts`."""

    router: str = "gate"
    shared: str | None = None
    """Experts that every token goes through, where a block has some."""
    shared_gate: str | None = None
    """A linear layer that gives a number for each token, whose sigmoid their output is multiplied with."""
    norms: tuple[str, ...] = ()
    """Of experts that lie in the layer itself and run beside its dense part: of the dense part's output, and of the
    experts' input and output (Gemma 4)."""
    is_clamped: bool = False
    """gpt-oss: biases, matrices that are turned, and gate and up values that take turns and are clamped."""


@dataclass(frozen=True)
class KnownLayer:
    """What a decoder layer is made of; the names are those of its modules."""

    input_norm: str | None = "input_layernorm"
    attention_out_norm: str | None = None
    """Of the attention's output, before it joins the stream."""
    gate_norm: str | None = "post_attention_layernorm"
    gate_out_norm: str | None = None
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    head_norms: tuple[str, str] | None = None
    """Of queries and keys."""
    may_lack_norms: bool = False
    """The config says whether there are such norms; where there are, part of a head may be rotated."""
    norms_rows: bool = False
    """All heads of a token are normed together."""
    norms_after_rotation: bool = False
    is_interleaved: bool = False
    """Neighbouring columns of a head are rotated together, in place of the columns of its two halves."""
    is_weight_less_one: bool = False
    """The norms' weights are stored less one."""
    has_gates: bool = False
    """What a query head attends to has a gate, which lies behind the query."""
    has_sinks: bool = False
    """Its attention has a sink for each head."""
    has_single_angles: bool = False
    """Cosines and sines come once for both columns that they turn, in place of twice."""
    has_paired_angles: bool = False
    """They come twice side by side, in place of all of them and then all again."""
    layer_input: tuple[str, ...] = ()
    """Of layers with an input of their own: its gate, its projection and that one's norm, and what else is there."""
    dropouts: tuple[str, ...] = ()
    """Modules of the layer that only drop."""
    multiplies_logits: bool = False
    """By the config's `logits_scaling`, in place of dividing them by it."""
    experts: KnownExperts | None = None
    """Of layers that have some; others of the same model may be dense."""
    window: Window = _own_window
    rope: Rope = _one_rope

    @property
    def modules(self) -> set[str]:
        """Names of the layer's own modules beside what mixes the tokens."""
        norms = (self.input_norm, self.attention_out_norm, self.gate_norm, self.gate_out_norm)
        return {"mlp", *self.dropouts, *(name for name in norms if name)}

    @property
    def attention_modules(self) -> set[str]:
        """Names of the modules of its attention."""
        return {*self.qkv, "o_proj"}


_HEAD_NORMS = ("q_norm", "k_norm")
_FUSED_GATE = ("gate_up_proj",)
_SHARED = KnownExperts(shared="shared_experts")
_GATED = KnownExperts(shared="shared_expert", shared_gate="shared_expert_gate")
_LLAMA = KnownLayer()
_NORMED_AFTER = KnownLayer(
    input_norm=None, attention_out_norm="post_attention_layernorm", gate_norm=None,
    gate_out_norm="post_feedforward_layernorm", head_norms=_HEAD_NORMS,
)  # fmt: skip
_GLM4 = KnownLayer(
    attention_out_norm="post_self_attn_layernorm", gate_out_norm="post_mlp_layernorm", gate_up=_FUSED_GATE,
    is_interleaved=True,
)  # fmt: skip
_HUNYUAN = KnownLayer(head_norms=("query_layernorm", "key_layernorm"), norms_after_rotation=True)
_PHI3 = KnownLayer(
    qkv=("qkv_proj",), gate_up=_FUSED_GATE, dropouts=("resid_attn_dropout", "resid_mlp_dropout"), window=_config_window,
)  # fmt: skip

KNOWN_LAYERS: dict[str, KnownLayer] = {
    "LlamaDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen2VLDecoderLayer": _LLAMA,
    "Qwen2_5_VLDecoderLayer": _LLAMA,
    "SeedOssDecoderLayer": _LLAMA,
    "GraniteDecoderLayer": _LLAMA,
    "MinistralDecoderLayer": _LLAMA,
    "MistralDecoderLayer": KnownLayer(window=_config_window),
    "Ministral3DecoderLayer": KnownLayer(window=_config_window),
    "Qwen3DecoderLayer": KnownLayer(head_norms=_HEAD_NORMS),
    "Qwen3VLTextDecoderLayer": KnownLayer(head_norms=_HEAD_NORMS),
    "SmolLM3DecoderLayer": KnownLayer(rope=_rope_where_asked),
    "GemmaDecoderLayer": KnownLayer(is_weight_less_one=True),
    "Gemma3DecoderLayer": KnownLayer(
        attention_out_norm="post_attention_layernorm",
        gate_norm="pre_feedforward_layernorm",
        gate_out_norm="post_feedforward_layernorm",
        head_norms=_HEAD_NORMS,
        is_weight_less_one=True,
        rope=_rope_by_type,
    ),
    "Gemma4TextDecoderLayer": KnownLayer(
        attention_out_norm="post_attention_layernorm",
        gate_norm="pre_feedforward_layernorm",
        gate_out_norm="post_feedforward_layernorm",
        layer_input=("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm", "act_fn"),
        experts=KnownExperts(
            router="router",
            norms=("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
        ),
    ),
    "Qwen3_5DecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, is_weight_less_one=True, has_gates=True),
    "Phi3DecoderLayer": _PHI3,
    "GlmDecoderLayer": KnownLayer(gate_up=_FUSED_GATE, is_interleaved=True),
    "Glm4DecoderLayer": _GLM4,
    "Ernie4_5DecoderLayer": KnownLayer(is_interleaved=True),
    "HeliumDecoderLayer": KnownLayer(is_interleaved=True),
    "HunYuanDenseV1DecoderLayer": _HUNYUAN,
    "Olmo2DecoderLayer": replace(_NORMED_AFTER, norms_rows=True),
    "Olmo3DecoderLayer": replace(_NORMED_AFTER, norms_rows=True, rope=_rope_by_type),
    "Qwen3MoeDecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, experts=KnownExperts()),
    "OlmoHybridAttentionDecoderLayer": replace(_NORMED_AFTER, norms_rows=True, rope=_rope_where_set),
    "OlmoHybridLinearAttentionDecoderLayer": _LLAMA,
    "Qwen3VLMoeTextDecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, experts=KnownExperts()),
    "Qwen2MoeDecoderLayer": KnownLayer(experts=_GATED),
    "Qwen3_5MoeDecoderLayer": KnownLayer(
        head_norms=_HEAD_NORMS, is_weight_less_one=True, has_gates=True, experts=_GATED
    ),
    "Qwen3NextDecoderLayer": KnownLayer(
        head_norms=_HEAD_NORMS, is_weight_less_one=True, has_gates=True, experts=_GATED
    ),
    "GptOssDecoderLayer": KnownLayer(
        has_sinks=True, has_single_angles=True, experts=KnownExperts(router="router", is_clamped=True)
    ),
    "MixtralDecoderLayer": KnownLayer(window=_config_window, experts=KnownExperts()),
    "OlmoeDecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, norms_rows=True, experts=KnownExperts()),
    "Glm4MoeDecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, may_lack_norms=True, experts=_SHARED),
    "DeepseekV3DecoderLayer": KnownLayer(experts=_SHARED),
    "Glm4MoeLiteDecoderLayer": KnownLayer(experts=_SHARED),
    "YoutuDecoderLayer": _LLAMA,
    "Dots1DecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, experts=_SHARED),
    "Ernie4_5_MoeDecoderLayer": KnownLayer(is_interleaved=True, experts=_SHARED),
    "CwmDecoderLayer": _LLAMA,
    "GraniteSWADecoderLayer": KnownLayer(has_sinks=True),
    "MellumDecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, experts=KnownExperts(), rope=_rope_by_type),
    "SolarOpenDecoderLayer": KnownLayer(experts=_SHARED),
    "HYV3DecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, experts=_SHARED),
    "ExaoneMoeDecoderLayer": KnownLayer(
        head_norms=_HEAD_NORMS, experts=_SHARED, window=_hybrid_window, rope=_rope_where_sliding
    ),
    "MiniMaxM2DecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, norms_rows=True, experts=KnownExperts()),
    "Exaone4DecoderLayer": replace(_NORMED_AFTER, window=_hybrid_window, rope=_rope_where_sliding),
    "FlexOlmoDecoderLayer": replace(_NORMED_AFTER, norms_rows=True, experts=KnownExperts()),
    "Glm4vTextDecoderLayer": replace(_GLM4, has_paired_angles=True),
    "GlmOcrTextDecoderLayer": replace(_GLM4, has_paired_angles=True),
    "Glm4vMoeTextDecoderLayer": KnownLayer(experts=_SHARED),
    "Granite4VisionTextDecoderLayer": _LLAMA,
    "HunYuanVLDenseV1DecoderLayer": _HUNYUAN,
    "HunYuanMoEV1DecoderLayer": replace(_HUNYUAN, experts=KnownExperts(shared="shared_mlp")),
    "Qwen2_5OmniDecoderLayer": _LLAMA,
    "Qwen3OmniMoeThinkerTextDecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, experts=KnownExperts()),
    "PaddleOCRDecoderLayer": KnownLayer(window=_no_window),
    "DeepseekOcr2TextDecoderLayer": KnownLayer(experts=_SHARED),
    "UnlimitedOcrTextDecoderLayer": KnownLayer(experts=_SHARED),
    "Emu3DecoderLayer": KnownLayer(dropouts=("dropout",)),
    "Gemma4UnifiedTextDecoderLayer": KnownLayer(
        attention_out_norm="post_attention_layernorm",
        gate_norm="pre_feedforward_layernorm",
        gate_out_norm="post_feedforward_layernorm",
    ),
    "Kolibri1DecoderLayer": KnownLayer(
        attention_out_norm="post_self_attn_layernorm",
        gate_out_norm="post_mlp_layernorm",
        head_norms=_HEAD_NORMS,
        experts=_SHARED,
        window=_hybrid_window,
        rope=_rope_where_sliding,
    ),
    "HyperCLOVAXDecoderLayer": KnownLayer(
        attention_out_norm="post_norm1", gate_out_norm="post_norm2", multiplies_logits=True
    ),
    "Phi4MultimodalDecoderLayer": _PHI3,
    "Molmo2DecoderLayer": KnownLayer(head_norms=_HEAD_NORMS, may_lack_norms=True),
    "Mistral4DecoderLayer": KnownLayer(experts=_SHARED),
}
