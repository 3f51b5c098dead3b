"""Reads latent attention; what `mixer_recognition` does for other mixers."""

from typing import Any

from tasks.decoder.dropout import number_site
from tasks.decoder.latent_attention import Latent, LatentAttention
from tasks.decoder.latent_elementwise import LatentHeads
from tasks.decoder.mixers import Mixer, MixerPlan
from tasks.decoder.module_reading import UnknownDecoderError, check_modules, read_norm, read_part
from tasks.decoder.projections import build_projection

KNOWN_LATENT = {"DeepseekV3Attention", "Glm4MoeLiteAttention", "YoutuAttention", "Mistral4Attention"}
"""Classes of transformers' that are alike but for their names."""


def plan_latent(attention: Any) -> MixerPlan:
    """Check latent attention.

    Raises:
        UnknownDecoderError: it is something else than what is known.
    """
    name = type(attention).__name__
    has_latent = attention.q_lora_rank is not None
    first = "q_a_proj" if has_latent else "q_proj"
    further = ("q_a_layernorm", "q_b_proj") if has_latent else ()
    check_modules(attention, {first, *further, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"})
    inputs = [read_part(attention, name) for name in (first, "kv_a_proj_with_mqa")]
    output = [read_part(attention, "o_proj")]
    inner = {name: [read_part(attention, name)] for name in (*further[1:], "kv_b_proj")}
    heads = LatentHeads(
        attention.num_heads,
        attention.qk_nope_head_dim,
        attention.qk_rope_head_dim,
        attention.v_head_dim,
        bool(attention.config.rope_interleave),
    )
    if heads.value > heads.size or attention.num_key_value_groups != 1 or heads.rotated % 2:
        raise UnknownDecoderError(
            f"the heads of its {name} have {heads.value} values, {heads.rotated} rotated and {heads.size} columns in "
            f"all, {attention.num_key_value_groups} to a key"
        )

    def build_latent(norm: str, projection: str) -> Latent:
        site = number_site(attention.layer_idx, projection)
        return read_norm(getattr(attention, norm)), build_projection(inner[projection], site)

    def build() -> Mixer:
        return LatentAttention(
            heads,
            build_latent("q_a_layernorm", "q_b_proj") if has_latent else None,
            build_latent("kv_a_layernorm", "kv_b_proj"),
            rope="",
            scale=float(attention.scaling),
        )

    return MixerPlan(inputs, output, build)
