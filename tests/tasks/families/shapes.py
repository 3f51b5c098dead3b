"""Unusual shapes of families that the matrix has: heads, experts, positions, biases, ties, activations, multipliers."""

from typing import Any

_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_SHARING = {
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
}  # fmt: skip
_MLA = {"num_key_value_heads": 4, "first_k_dense_replace": 1}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    # heads
    "llama_heads_of_6": {"model_type": "llama", "head_dim": 6},
    "qwen3_one_key_head": {"model_type": "qwen3", "num_key_value_heads": 1},
    "qwen3_heads_of_20": {
        "model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 20, "hidden_size": 40,
    },
    "gemma_one_key_head": {
        "model_type": "gemma", "num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 16,
    },
    "gemma4_values_are_keys": {
        "model_type": "gemma4_text", **_SLIDING, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "global_head_dim": 16,
    },
    "gemma4_shared_keys": {
        "model_type": "gemma4_text", **_SHARING, "num_global_key_value_heads": 2, "use_double_wide_mlp": True,
    },
    # biases, ties, activations, multipliers
    "llama_biases_tied": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "vocab_size": 101,
    },
    "llama_relu2": {"model_type": "llama", "hidden_act": "relu2"},
    "granite_everything": {
        "model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0,
        "attention_multiplier": 0.4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "gemma3_caps": {
        "model_type": "gemma3_text", **_SLIDING, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 10.0,
    },
    # positions and windows
    "llama_yarn": {"model_type": "llama", "rope_parameters": _YARN},
    "llama_llama3": {"model_type": "llama", "rope_parameters": _LLAMA3},
    "phi3_longrope": {"model_type": "phi3", "rope_parameters": _LONGROPE, "original_max_position_embeddings": 32},
    "phi3_partial": {"model_type": "phi3", "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "qwen2_window": {"model_type": "qwen2", **_SLIDING, "use_sliding_window": True},
    "smollm3_no_positions": {
        "model_type": "smollm3", "no_rope_layers": [0, 0], "layer_types": ["full_attention"] * 2,
    },
    # experts
    "qwen3_moe_6_choose_1": {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 1},
    "qwen3_moe_5_choose_5": {"model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 5},
    "qwen3_moe_of_22": {"model_type": "qwen3_moe", "moe_intermediate_size": 22},
    "qwen3_moe_1": {"model_type": "qwen3_moe", "num_experts": 1, "num_experts_per_tok": 1},
    "qwen3_moe_dense": {"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]},
    "deepseek_v3_groups": {
        "model_type": "deepseek_v3", **_MLA, "num_local_experts": 8, "n_routed_experts": 8, "n_group": 4,
        "topk_group": 2, "num_experts_per_tok": 3, "norm_topk_prob": False, "routed_scaling_factor": 2.5,
    },
    "deepseek_v3_no_query_rank": {"model_type": "deepseek_v3", **_MLA, "q_lora_rank": None, "n_shared_experts": 2},
    "deepseek_v3_yarn": {
        "model_type": "deepseek_v3", **_MLA, "attention_bias": True,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "ernie4_5_moe_no_shared": {
        "model_type": "ernie4_5_moe", "moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_num_shared_experts": 0,
    },
    "gpt_oss_6_choose_1": {
        "model_type": "gpt_oss", **_SLIDING, "num_local_experts": 6, "num_experts_per_tok": 1, "attention_bias": False,
    },
    # recurrent
    "qwen3_5_other_heads": {
        "model_type": "qwen3_5_text", "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "num_hidden_layers": 3, "linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 10,
        "linear_value_head_dim": 12,
    },
    "qwen3_next_one_key_head": {
        "model_type": "qwen3_next", **_HYBRID, "num_experts": 3, "num_experts_per_tok": 3, "mlp_only_layers": [0],
        "linear_num_key_heads": 1, "linear_num_value_heads": 3,
    },
    "falcon_h1_biases": {
        "model_type": "falcon_h1", "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_rms_norm": True,
        "projectors_bias": True, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True,
    },
}  # fmt: skip
