"""Further families: each part of a composite's config, text, images and audio, gets small sizes by its names."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# Of parts that see no text, wherever such a config has the attribute.
_SIZES: dict[str, Any] = {
    "hidden_size": 16, "embed_dim": 16, "d_model": 16, "intermediate_size": 16, "mlp_dim": 16, "mlp_ratio": 1.0,
    "num_hidden_layers": 1, "num_layers": 1, "depth": 1, "n_layers": 1, "encoder_layers": 1, "encoder_hidden_layers": 1,
    "num_attention_heads": 2, "num_heads": 2, "num_key_value_heads": 2, "encoder_attention_heads": 2, "head_dim": 8,
    "image_size": 28, "patch_size": 14, "spatial_merge_size": 1, "window_size": 8, "encoder_ffn_dim": 16,
    "num_mel_bins": 16, "max_source_positions": 32, "out_hidden_size": 32, "projection_dim": 16, "output_channels": 16,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0], "global_attn_indexes": [0],
    "num_position_embeddings": 16, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    "position_embedding_size": 64, "cpe_embed_dim": 16,
}  # fmt: skip
_TEXT = ("text_config", "llm_config", "thinker_config", "language_config")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MLA = {"num_key_value_heads": 4, "first_k_dense_replace": 1}
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
}
_BYTES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_AUDIO = {"downsample_hidden_size": 16, "output_dim": 32}
_QUANTIZER = {"base_channels": 32, "num_res_blocks": 1, "embed_dim": 16}
FURTHER: dict[str, dict[str, Any]] = {
    "aria": {},
    "audioflamingo3": {},
    "axk2": _MLA,
    "blt": {
        "vocab_size": 260, "encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4],
        "encoder_config": {**_BYTES, "hidden_size_global": 64, "num_hidden_layers": 1},
        "decoder_config": {**_BYTES, "hidden_size_global": 64, "num_hidden_layers": 2},
        "global_config": {**_BYTES, "hidden_size": 64, "num_hidden_layers": 2},
        "patcher_config": {**_BYTES, "num_hidden_layers": 1},
    },
    "chameleon": {
        "vq_config": {**_QUANTIZER, "channel_multiplier": [1], "latent_channels": 16, "num_embeddings": 8},
        "vocabulary_map": {"<image>": 0, "IMGIMGAZ": 96},
    },
    "cohere2_vision": {"alignment_intermediate_size": 32},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "cosmos3_edge": {"text_config": _MROPE},
    "cosmos3_omni": {},
    "ctrl": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {"sam_config": {"downsample_channels": [16, 16], "output_channels": 16}},
    },
    "deepseek_vl": {},
    "deepseek_vl_hybrid": {},
    "emu3": {
        "vq_config": {
            **_QUANTIZER, "channel_multiplier": [1, 1], "codebook_size": 8, "latent_channels": 4, "hidden_size": 16,
        },
        "vocabulary_map": {"<image>": 5, **{f"<|visual token {number:06d}|>": 10 + number for number in range(8)}},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 24], "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
        },
    },
    "exaone4_5": {},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 32, "intermediate_size": 8}},
    "fuyu": {},
    "gemma4_unified": {},
    "git": {},
    "glm46v": {"text_config": _MROPE},
    "glm5_next": {
        "text_config": {
            **_HYBRID, "num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0, "qk_nope_head_dim": 16,
            "v_head_dim": 16, "linear_num_heads": 4, "linear_head_dim": 8,
        },
    },
    "glm_ocr": {"text_config": _MROPE},
    "glmasr": {},
    "glmga": {"text_config": _MROPE},
    "got_ocr2": {},
    "gpt-sw3": {},
    "gpt_neox_japanese": {},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0], "downsample_rate": "1/1",
        "vision_config": {"hidden_size": 64},
        "qformer_config": {
            "model_type": "blip_2_qformer", "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1,
            "intermediate_size": 16, "encoder_hidden_size": 64,
        },
    },
    "granite_speech": {},
    "granite_speech_plus": {},
    "hrm_text": {"prefix_lm": False},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}}},
    "hyperclovax_vision_v2": {},
    "idefics2": {},
    "idefics3": {},
    "inkling_mm_model": {"vision_config": {"num_hidden_layers": 4}},
    "janus": {"vq_config": {**_QUANTIZER, "channel_multiplier": [1], "embed_dim": 8}},
    "kimi_k25": {"text_config": _MLA},
    "kosmos-2.5": {},
    "lighton_ocr": {},
    "llava_next": {},
    "llava_next_video": {},
    "longcat_flash": {
        "num_layers": 1, "num_hidden_layers": 2, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
        "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "num_key_value_heads": 4,
    },
    "minicpm_ocr": {"text_config": _HYBRID},
    "minicpmv4_6": {"text_config": _HYBRID},
    "minicpmv4_7": {"text_config": _HYBRID},
    "minimax_m3_vl": {},
    "mistral4": _MLA,
    "mistral_large4": {"text_config": _MLA},
    "mllama": {"text_config": {"cross_attention_layers": [1], "num_hidden_layers": 3}},
    "modernbert-decoder": {},
    "molmo2": {
        "text_config": {"additional_vocab_size": 3},
        "vision_config": {"image_size": [28, 28], "num_hidden_layers": 2},
        "adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 32},
    },
    "moshi": {},
    "moss_transcribe_diarize": {},
    "muse_glimmer": {},
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 4, "patch_sizes": [2, 2, 2, 2], "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
        },
    },
    "musicflamingo": {"rotary_dim": 8},
    "nemo_speechlm": {
        "text_config": {"layers_block_type": ["linear_attention", "full_attention"]},
        "audio_config": {
            "asr_config": {"hidden_size": 16, "num_mel_bins": 16},
            "diarization_config": {"head_config": {"audio_hidden_size": 16}, "audio_config": {"hidden_size": 16}},
        },
        "word_timestamp_config": {"hidden_size": 16},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "openai-gpt": {},
    "ovis2": {
        "visual_indicator_token_ids": [90, 91, 92, 93, 94], "hidden_size": 32,
        "vision_config": {"vocab_size": 64, "num_visual_indicator_tokens": 5, "hidden_stride": 1},
    },
    "paddleocr_vl": {"text_config": _MROPE},
    "phi4_multimodal": {},
    "pp_chart2table": {},
    "qianfan_ocr": {},
    "qwen2_5_omni_thinker": {"text_config": _MROPE, "vision_start_token_id": 88},
    "qwen3_asr": {"audio_config": _AUDIO},
    "qwen3_omni_moe_thinker": {"text_config": _MROPE, "vision_start_token_id": 88, "audio_config": _AUDIO},
    "qwen4_exp": {},
    "qwen4_exp_text": {},
    "step3p7": {},
    "trocr": {},
    "unlimited_ocr": {},
    "video_llama_3": {},
    "video_llava": {},
    "vipllava": {},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
    "zamba": {
        "num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "layer_types": ["mamba", "hybrid"],
        "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2, "mamba_dt_rank": 4,
        "use_mamba_kernels": False, "attention_head_dim": 16, "attention_hidden_size": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def shrink_parts(
    kind: Any, settings: dict[str, Any], sizes: dict[str, Any], *, sees_text: bool = True
) -> dict[str, Any]:
    """Return the settings of a small config of a kind, with those of its parts.

    Args:
        kind: class of the config.
        settings: that are wanted besides.
        sizes: of configs that see text.
        sees_text: the config's part does.
    """
    default = kind()
    parts = {name: getattr(default, name, None) for name in getattr(kind, "sub_configs", {})}
    inner = {}
    for name, part in parts.items():
        if isinstance(part, PreTrainedConfig):
            is_text = name in _TEXT or "text" in name
            known: Any = CONFIG_MAPPING[part.model_type] if part.model_type in CONFIG_MAPPING else type(part)
            small = shrink_parts(known, settings.get(name, {}), sizes, sees_text=is_text)
            inner[name] = {"model_type": part.model_type, **small}
    names = set(getattr(kind, "__dataclass_fields__", {})) | set(getattr(kind, "__annotations__", {}))
    names |= set(getattr(kind, "attribute_map", {}))
    # What lies beside the parts of a composite are no sizes of theirs.
    has_parts = "text_config" in inner or (bool(inner) and not sees_text)
    own = {} if has_parts else sizes if sees_text else _SIZES
    return {**{name: value for name, value in own.items() if name in names}, **settings, **inner}
