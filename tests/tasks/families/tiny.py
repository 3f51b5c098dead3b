"""Tiny models of many families with random weights: every size of a config's defaults is replaced by a small one."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from tasks.families.classes import choose_class
from tests.tasks.families.further import FURTHER, shrink_parts

VOCABULARY = 97
_LAYERS = 2
_HIDDEN = 32
# Set wherever a family's config has the attribute.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": _HIDDEN,
    "n_embd": _HIDDEN,
    "d_model": _HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": _LAYERS,
    "n_layer": _LAYERS,
    "n_layers": _LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_router_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 256,
    # recurrent layers
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "lru_width": _HIDDEN,
    # gemma
    "query_pre_attn_scalar": 8,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 16,
    "laurel_rank": 4,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_MLA = {"num_key_value_heads": 4}
_DENSE_FIRST = {"first_k_dense_replace": 1}
_DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_GLM_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "image_size": 28, "patch_size": 14,
    "out_hidden_size": _HIDDEN, "spatial_merge_size": 1,
}  # fmt: skip
_AUDIO = {
    "d_model": 16, "hidden_size": 16, "intermediate_size": 16, "encoder_ffn_dim": 16, "encoder_layers": 1,
    "num_hidden_layers": 1, "encoder_attention_heads": 2, "num_attention_heads": 2, "num_mel_bins": 16,
    "max_source_positions": 32,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": _HIDDEN,
    "num_position_embeddings": 16, "patch_size": 4, "deepstack_visual_indexes": [0],
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}}
# What a family needs besides, by the name of a case; a case of another name than its model type says its type.
SETTINGS: dict[str, dict[str, Any]] = {
    # dense
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {},
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "gemma3n_text": {
        **_SLIDING,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.5, 0.0],
        "num_kv_shared_layers": 0,
    },
    "gemma4_text": {**_SLIDING, "head_dim": 8, "num_global_key_value_heads": 2},
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": ["full_attention", "full_attention"]},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "glm": {},
    "glm4": {},
    "cohere": {},
    "cohere2": _SLIDING,
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "exaone4": _SLIDING,
    "ministral": _SLIDING,
    "ministral3": {},
    "starcoder2": {},
    "stablelm": {},
    "gpt_neox": {},
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "nemotron": {},
    "helium": {},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": _HIDDEN},
    "falcon": {},
    "seed_oss": {},
    "minicpm3": _MLA,
    "nanochat": {},
    "vaultgemma": _SLIDING,
    "beam": {},
    "biogpt": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cwm": {},
    "diffllama": {},
    "doge": {},
    "flint": {},
    "gemma4_unified_text": {},
    "gpt_bigcode": {},
    "gpt_neo": {
        "num_layers": 2, "num_heads": 4, "attention_layers": ["global", "local"],
        "attention_types": [[["global", "local"], 1]], "window_size": 8,
    },
    "gptj": {"rotary_dim": 4},
    "granite_swa": {},
    "hyperclovax": {},
    "jais2": {},
    "mpt": {},
    "persimmon": {},
    "xglm": {},
    "youtu": _MLA,
    # experts
    "qwen2_moe": {},
    "qwen3_moe": {},
    "laguna": {},
    "aria_text": {},
    "axk1": _MLA,
    "cohere2_moe": {},
    "deepseek_v32": {**_DENSE_FIRST, **_MLA},
    "granitemoe_swa": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling_text": {},
    "jetmoe": {},
    "kolibri1": {},
    "mellum": _SLIDING,
    "minimax": {},
    "minimax_m3_vl_text": {},
    "solar_open": {},
    "mixtral": {},
    "olmoe": {},
    "flex_olmo": {},
    "minimax_m2": {},
    "deepseek_v2": {**_DENSE_FIRST, **_MLA, "topk_method": "greedy"},
    "deepseek_v3": {**_DENSE_FIRST, **_MLA},
    "glm4_moe": _DENSE_FIRST,
    "glm4_moe_lite": {**_DENSE_THEN_SPARSE, **_MLA},
    "glm_moe_dsa": {
        **_MLA,
        **_DENSE_THEN_SPARSE,
        "first_k_dense_replace": 1,
        "layer_types": ["indexed_attention", "indexed_attention"],
        "indexer_types": ["full", "full"],
    },
    "dots1": _DENSE_FIRST,
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "exaone_moe": {**_SLIDING, **_DENSE_THEN_SPARSE, "first_k_dense_replace": 1},
    "hunyuan_v1_moe": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "phimoe": {},
    "gpt_oss": _SLIDING,
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 64,
    },
    "gemma4_moe": {
        "model_type": "gemma4_text",
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
    },
    "afmoe": {"num_dense_layers": 1, "layer_types": ["sliding_attention", "full_attention"]},
    "mimo_v2_flash": {**_DENSE_THEN_SPARSE, "layer_types": ["full_attention", "sliding_attention"]},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
        "mlp_layer_types": ["moe", "moe"],
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    # recurrent
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "olmo_hybrid": _HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "granitemoehybrid": {**_HYBRID, "mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid_dense": {
        "model_type": "granitemoehybrid", **_HYBRID, "num_local_experts": 0, "num_experts_per_tok": 0,
        "mamba_n_heads": 8, "mamba_d_head": 8,
    },
    "recurrent_gemma": {},
    "rwkv": {},
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 4,
        "mamba_headdim": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 24,
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "falcon_mamba": {},
    "kimi_linear": {**_HYBRID, **_MLA, **_DENSE_THEN_SPARSE, "linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {
        **_HYBRID, **_MLA, **_DENSE_THEN_SPARSE, "first_k_dense_replace": 1, "num_expert_group": 1,
        "linear_head_dim": 8, "linear_num_heads": 4, "layer_group_size": 2,
    },
    # composites: a text decoder inside an image or audio model
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **_SLIDING},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8},
    },
    "gemma4": {
        "text_config": {"head_dim": 8, **_SLIDING, "num_global_key_value_heads": 2},
        "vision_config": {**_VISION, "head_dim": 8, "num_key_value_heads": 2, "position_embedding_size": 64},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14},
    },
    "qwen2_5_vl": {"text_config": _MROPE, "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [0]}},
    "qwen3_vl": {"text_config": _MROPE, "vision_config": _QWEN_VISION},
    "qwen3_vl_moe": {"text_config": _MROPE, "vision_config": _QWEN_VISION},
    "qwen3_5": {"text_config": {**_HYBRID, **_MROPE}, "vision_config": _QWEN_VISION},
    "qwen3_5_moe": {"text_config": {**_HYBRID, **_MROPE}, "vision_config": _QWEN_VISION},
    "internvl": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {**_VISION, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]},
    },
    "llama4": {
        "text_config": {
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 64,
        },
        "vision_config": {
            **_VISION, "image_size": 16, "patch_size": 8, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
    },
    "qwen2_vl": {
        "text_config": _MROPE,
        "vision_config": {
            "embed_dim": 16, "hidden_size": _HIDDEN, "depth": 1, "num_heads": 2, "patch_size": 14,
            "spatial_merge_size": 1,
        },
    },
    "glm4v": {"text_config": _MROPE, "vision_config": _GLM_VISION},
    "glm4v_moe": {"text_config": {**_MROPE, **_DENSE_FIRST}, "vision_config": _GLM_VISION},
    "smolvlm": {
        "text_config": {"model_type": "llama"},
        "vision_config": {**_VISION, "image_size": 28, "patch_size": 14},
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
    },
    "aya_vision": {
        "text_config": {"model_type": "cohere2", **_SLIDING},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
    },
    "lfm2_vl": {
        "text_config": {
            "model_type": "lfm2", "layer_types": ["conv", "full_attention"], "full_attn_idxs": None,
            "block_multiple_of": 8,
        },
        "vision_config": {**_VISION, "model_type": "siglip2_vision_model", "patch_size": 14},
    },
    "voxtral": {"text_config": {"model_type": "llama"}, "audio_config": {"model_type": "voxtral_encoder", **_AUDIO}},
    "qwen2_audio": {
        "text_config": {"model_type": "qwen2"},
        "audio_config": {"model_type": "qwen2_audio_encoder", **_AUDIO},
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
    },
}  # fmt: skip
CASES = (*SETTINGS, *FURTHER)


def build_config(case: str) -> Any:
    """Return a tiny config of a case."""
    if case in FURTHER:
        return CONFIG_MAPPING[case](**shrink_parts(CONFIG_MAPPING[case], FURTHER[case], SIZES))
    settings = dict(SETTINGS[case])
    kind: Any = CONFIG_MAPPING[settings.pop("model_type", case)]
    if "text_config" not in settings:
        return kind(**_shrink(kind, settings))
    text = dict(settings["text_config"])
    wanted: Any = CONFIG_MAPPING[text["model_type"]] if "model_type" in text else kind.sub_configs["text_config"]
    return kind(**{**settings, "text_config": {"model_type": wanted.model_type, **_shrink(wanted, text)}})


def build_model(case: str) -> PreTrainedModel:
    """Return a tiny model of a case in fp32, its weights drawn from a fixed seed."""
    config = build_config(case)
    torch.manual_seed(0)
    kind: Any = choose_class(config, case)
    model: PreTrainedModel = kind._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # A bias, a scale that would hide what comes before it, or the embedding of the padding.
            if parameter.is_floating_point():
                parameter[parameter == 0] = torch.rand(int((parameter == 0).sum())) * 0.4 - 0.2
    return model.float().eval()


def save_model(case: str, folder: Path) -> Path:
    """Write a tiny model of a case as a checkpoint."""
    build_model(case).save_pretrained(folder)
    return folder


def _shrink(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes that a config of a kind has, and the settings."""
    return {**{name: value for name, value in SIZES.items() if name in _names(kind)}, **settings}


def _names(kind: Any) -> set[str]:
    """Return the settings of a kind of config, under their own and their other names."""
    fields = set(getattr(kind, "__dataclass_fields__", {})) | set(getattr(kind, "__annotations__", {}))
    return fields | set(getattr(kind, "attribute_map", {}))
