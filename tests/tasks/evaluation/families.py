"""Tiny models of many families, with random weights; a window where the family has one."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large random weights, so that the next token depends on the context and near ties are rare.
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 9},
    "gemma3_text": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt2": {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    # The next two cannot be run flat: an attention of their own, and one with a learned term in every head's scores.
    "falcon": {"hidden_dropout": 0.0},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}
FAMILIES = tuple(_SETTINGS)[:-2]


def build(family: str) -> PreTrainedModel:
    """Make a model with weights from a seed."""
    config = AutoConfig.for_model(family, **{**_SIZES, **_SETTINGS[family]})
    torch.manual_seed(7)
    attention = "eager" if family == "gpt_oss" else "sdpa"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return model
