"""Small models of every family that the fused decoder knows, and what its tests compute with them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.config import TrainingConfig
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.float8 import quantize_decoder
from tasks.decoder.recognition import recognize_decoder
from tasks.tokenization.labels import Example
from tasks.training.batches import Batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.reference import sum_losses
from tasks.training.token_table import TokenTable
from tests.tasks.tokenization.oracle import trained_runs

FAMILIES = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma3_text"),
    *(
        "ministral",
        "ministral3",
        "seed_oss",
        "granite",
        "smollm3",
        "gemma",
        "phi3",
        "glm",
        "glm4",
        "ernie4_5",
        "helium",
    ),
    *(
        "hunyuan_v1_dense",
        "olmo2",
        "olmo3",
        "exaone4",
        "gemma4_text",
        "qwen3_5_text",
        "olmo_hybrid",
        "youtu",
        "hyperclovax",
    ),
    *("qwen3_moe", "mixtral", "olmoe", "glm4_moe", "dots1", "ernie4_5_moe", "qwen2_moe", "qwen3_5_moe_text"),
    *("qwen3_next", "gpt_oss", "deepseek_v3", "glm4_moe_lite", "gemma4_moe", "flex_olmo", "kolibri1"),
]
# Gemma 4's scores have no scale: what is rounded off in 16 bits grows.
LIMITS = {"gemma4_text": 0.2, "gemma4_moe": 0.5}
# Without SDPA in transformers.
EAGER = ("gpt_oss",)
LENGTHS = (17, 1, 3, 40, 9)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENTS = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
# Of them, those whose tokens go through a few experts each.
EXPERTS = FAMILIES[FAMILIES.index("qwen3_moe") :]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


def _partial(share: float) -> dict[str, Any]:
    """Rotation of the first columns of a head only."""
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}


_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "pad_token_id": 0,
}
_GROUPS: dict[str, Any] = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
FURTHER: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 7},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
    },
    "ministral": {
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ministral3": {
        "sliding_window": None,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.3,
            "original_max_position_embeddings": 8,
        },
    },
    "seed_oss": {"head_dim": 32, "attention_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.6,
        "residual_multiplier": 1.7,
        "attention_multiplier": 0.2,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": 0},
    "gemma": {"head_dim": 32, "pad_token_id": 0},
    "phi3": {"sliding_window": 6, "pad_token_id": 0, "rope_parameters": _partial(0.75)},
    "glm": {"head_dim": 16, "pad_token_id": 0, "rope_parameters": _partial(0.5), "attention_bias": True},
    "glm4": {"head_dim": 32, "pad_token_id": 0, "rope_parameters": _partial(0.5)},
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "helium": {"head_dim": 16, "pad_token_id": 0},
    "hunyuan_v1_dense": {"head_dim": 16, "pad_token_id": 0, "attention_bias": True},
    "olmo2": {"pad_token_id": 0},
    "olmo3": {
        "pad_token_id": 0,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 5,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
        "final_logit_softcapping": 3.0,
        "pad_token_id": 0,
    },
    "gemma4_moe": {
        "model_type": "gemma4_text",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 5,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "pad_token_id": 0,
    },
    "qwen3_5_text": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "pad_token_id": 0,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 7},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "pad_token_id": 0},
    "glm4_moe": {
        "head_dim": 32,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.7,
        "use_qk_norm": True,
        "rope_parameters": _partial(0.5),
        "pad_token_id": 0,
    },
    "deepseek_v3": {
        **_LATENT,
        **_GROUPS,
        "q_lora_rank": 32,
        "first_k_dense_replace": 1,
        "rope_interleave": True,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32,
        },
    },
    "glm4_moe_lite": {
        **_LATENT,
        **_GROUPS,
        "q_lora_rank": None,
        "v_head_dim": 24,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_interleave": False,
    },
    "youtu": {**_LATENT, "q_lora_rank": 32},
    "dots1": {
        "head_dim": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_types": ["full_attention"] * 3,
        "pad_token_id": 0,
    },
    "ernie4_5_moe": {
        "head_dim": 16,
        "moe_num_experts": 6,
        "moe_k": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "pad_token_id": 0,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_5_moe_text": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "pad_token_id": 0,
    },
    "qwen3_next": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "pad_token_id": 0,
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
        "swiglu_limit": 0.4,
        "pad_token_id": 0,
    },
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_allow_neg_eigval": True,
        "pad_token_id": 0,
    },
    "hyperclovax": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.6,
        "residual_multiplier": 1.7,
        "attention_multiplier": 0.2,
        "use_post_norm": True,
        "pad_token_id": 0,
    },
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True, "pad_token_id": 0},
    "kolibri1": {
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "pad_token_id": 0,
    },
    "exaone4": {
        "head_dim": 32,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def name_attention_modules(family: str) -> tuple[str, ...]:
    """Names of the linear layers of its attention."""
    shape = FURTHER.get(family, {})
    if "kv_lora_rank" not in shape:
        return ATTENTION
    return ("q_a_proj", "q_b_proj", *LATENTS) if shape["q_lora_rank"] else ("q_proj", *LATENTS)


def make_model(family: str, **further: Any) -> Any:
    """A small model in fp32 with weights of every kind off their start."""
    torch.manual_seed(0)
    shape = {"model_type": family, **SHAPE, **FURTHER.get(family, {}), **further}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    attention = "eager" if family in EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager", dtype=torch.float32
    )
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 0.05 * noise if parameter.dim() > 1 else parameter.data + 0.2 * noise
    return model


def build(family: str, dtype: torch.dtype, device: str = "cpu", **settings: Any) -> PeftModel:
    """A small model with weights of every kind off their start, and an adapter off its own."""
    model = make_model(family)
    if settings.get("dropout") and family in EXPERTS:
        settings = {
            "target_modules": name_attention_modules(family),
            **settings,
        }  # PEFT has no dropout for parameters of experts
    adapted = attach_adapter(model.to(dtype), TrainingConfig(**{"rank": 8, "alpha": 16, **settings}), seed=1)
    for parameter in collect_trained(adapted).values():
        parameter.data = (0.05 * torch.randn_like(parameter)).to(torch.float64 if dtype == torch.float64 else None)
    return adapted.to(device).train()


def draw_table(lengths: Sequence[int] = LENGTHS, *, untrained: Sequence[int] = ()) -> TokenTable:
    """Examples of the given lengths; the second half of each is trained, and nothing of the untrained ones."""
    generator = np.random.default_rng(0)
    offsets = np.cumsum([0, *lengths])
    input_ids = generator.integers(0, 128, offsets[-1]).astype(np.int32)
    targets = np.full(offsets[-1], -100, np.int32)
    for number, length in enumerate(lengths):
        if number not in untrained:
            span = slice(offsets[number] + length // 2, offsets[number + 1] - 1)
            targets[span] = input_ids[span.start + 1 : span.stop + 1]
    return TokenTable([f"example {number}" for number in range(len(lengths))], offsets, input_ids, targets)


def list_examples(table: TokenTable) -> list[Example]:
    """The table's examples one by one, labels and all."""
    examples = []
    for begin, end in zip(table.offsets, table.offsets[1:], strict=False):
        labels = [-100, *table.targets[begin : end - 1].tolist()]
        examples.append(Example(table.input_ids[begin:end].tobytes(), tuple(trained_runs(labels))))
    return examples


def take_grads(model: PeftModel) -> Tensor:
    """The adapter's gradient as one vector, fp64; it is gone from the model."""
    parameters = collect_trained(model).values()
    grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return grads


def compute_reference(model: PeftModel, table: TokenTable) -> tuple[float, Tensor]:
    total = torch.zeros((), device=next(model.parameters()).device)
    dtype = next(iter(model.get_base_model().parameters())).dtype
    with torch.autocast(total.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for example in list_examples(table):
            if len(example.input_ids) > 1:
                total = total + sum_losses(model, example)
    total.backward()
    return float(total.detach()), take_grads(model)


def compute_fused(model: PeftModel, batch: Batch, *, recomputed: int = 0, fp8: bool = False) -> tuple[float, Tensor]:
    decoder = recognize_decoder(model)
    if fp8:
        decoder = quantize_decoder(decoder)
    device = next(model.parameters()).device
    engine = FusedEngine(decoder, device, 4096, recomputed, LOGITS_BYTES, 4096)
    loss = engine.sum_losses(batch)
    loss.backward()
    return float(loss.detach()), take_grads(model)


def measure_difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())
