"""Tiny models of several families, with random weights and every oddity that the family has."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tasks.training.conftest import SHAPE

_WINDOW = {"sliding_window": 8}
_EXPERTS = {"num_local_experts": 4}
# What a family's config says beside the shape.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "phi3": {**_WINDOW, "pad_token_id": 0},
    "gemma3_text": {**_WINDOW, "final_logit_softcapping": 5.0},
    "olmo2": {},
    "mixtral": {**_EXPERTS, "sliding_window": None},
    "granite": {"logits_scaling": 3.0},
    "cohere": {},
    "gemma2": _WINDOW,
    "gpt_oss": {**_WINDOW, **_EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "bloom": {"n_layer": 2, "n_head": 4},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
FLAT = ("llama", "qwen2", "gpt2", "phi3", "gemma3_text", "olmo2", "mixtral", "granite", "cohere", "qwen3_5_text")
PADDED = {"gemma2": "softcap", "gpt_oss": "s_aux", "bloom": "not one that can be chosen by name"}


def build_family(folder: Path, family: str, **changes: Any) -> Path:
    """Save a tiny model of a family and return its folder."""
    torch.manual_seed(0)
    shape = {**SHAPE, "bos_token_id": 2, **FAMILIES[family], **changes}
    if "n_head" in shape:
        shape = {key: value for key, value in shape.items() if not key.startswith(("num_", "head_", "max_"))}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    model.save_pretrained(folder)
    return folder
