"""What is run on a GPU for the tables of `gpu.py`, ours and peers', and what each row of the table compares."""

from typing import Any

_PACKED = {"rank": 64, "alpha": 128, "packing": True}
# As many tokens a step as the peers have.
_KEPT = {**_PACKED, "tokens_per_pack": 32768, "micro_batch": 1}
_LEAN = {**_PACKED, "tokens_per_pack": 8192, "micro_batch": 1, "gradient_accumulation_steps": 4}
# Every weight of the model, with AdamW's moments in fp32, or in 8 bits through torchao.
_FULL = {"method": "full", "packing": True, "learning_rate": 1e-5, "micro_batch": 1}
_FULL_7B = {**_FULL, "tokens_per_pack": 8192, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
_EIGHT_BITS = {"optimizer": "adamw_8bit"}
# Adapters of all experts of rank 64 would be 2.5 billion values.
_EXPERTS = {**_LEAN, "rank": 16, "alpha": 32, "tokens_per_pack": 16384, "gradient_accumulation_steps": 2}
# Unsloth runs out of 139 GiB with 8 examples of 2,048 tokens at once.
_PEERS_EXPERTS = {"rank": 16, "batch": 4, "accumulation": 4}
_DELTA_NET = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
_EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3]
# Two GPUs, as many tokens a step as the peers' 8 examples of 2,048 on each.
_TWO = {**_PACKED, "tokens_per_pack": 16384, "micro_batch": 2, "num_processes": 2}
_DIVIDED = {**_TWO, "strategy": "fsdp"}
# What is run: who, shape, settings; steps in all.
RUNS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "ours-7b": ("ours", "qwen2.5-7b", {**_KEPT, "gradient_checkpointing": False}, 11),
    "ours-7b-lean": ("ours", "qwen2.5-7b", {**_LEAN, "gradient_checkpointing": True}, 9),
    "ours-7b-fp8": ("ours", "qwen2.5-7b", {**_KEPT, "gradient_checkpointing": False, "base_weights": "fp8"}, 12),
    "ours-7b-fp8-lean": ("ours", "qwen2.5-7b", {**_LEAN, "gradient_checkpointing": True, "base_weights": "fp8"}, 9),
    "ours-7b-defaults": ("ours", "qwen2.5-7b", {}, 40),
    "ours-7b-dropout": ("ours", "qwen2.5-7b", {"dropout": 0.05}, 40),
    "ours-7b-general": ("ours", "qwen2.5-7b", {"engine": "general"}, 30),
    "ours-0.6b-defaults": ("ours", "qwen3-0.6b", {}, 150),
    "ours-0.6b": ("ours", "qwen3-0.6b", {**_KEPT, "tokens_per_pack": 65536}, 15),
    "ours-qwen3.5-4b": ("ours", "qwen3.5-4b", {**_KEPT, "gradient_checkpointing": False}, 12),
    "ours-qwen3.5-4b-fp8": (
        "ours",
        "qwen3.5-4b",
        {**_KEPT, "gradient_checkpointing": False, "base_weights": "fp8"},
        12,
    ),
    "ours-qwen3.5-4b-lean": ("ours", "qwen3.5-4b", {**_LEAN, "gradient_checkpointing": True}, 10),
    "ours-qwen3.5-4b-general": ("ours", "qwen3.5-4b", {**_LEAN, "engine": "general"}, 8),
    "ours-gemma4-e4b": ("ours", "gemma4-e4b", {**_KEPT, "gradient_checkpointing": False}, 12),
    "ours-gemma4-e4b-fp8": (
        "ours",
        "gemma4-e4b",
        {**_KEPT, "gradient_checkpointing": False, "base_weights": "fp8"},
        12,
    ),
    "ours-gemma4-e4b-lean": ("ours", "gemma4-e4b", {**_LEAN, "gradient_checkpointing": True}, 10),
    "ours-gemma4-e4b-general": ("ours", "gemma4-e4b", {**_LEAN, "engine": "general"}, 8),
    "ours-30b-a3b-lean": ("ours", "qwen3-30b-a3b", {**_EXPERTS, "gradient_checkpointing": True}, 8),
    # As many layers are recomputed as the memory asks for.
    "ours-30b-a3b": ("ours", "qwen3-30b-a3b", _EXPERTS, 8),
    "ours-30b-a3b-fp8": (
        "ours",
        "qwen3-30b-a3b",
        {**_EXPERTS, "gradient_checkpointing": True, "base_weights": "fp8"},
        8,
    ),
    # What is left of the memory keeps all activations.
    "ours-30b-a3b-fp8-kept": (
        "ours",
        "qwen3-30b-a3b",
        {**_EXPERTS, "gradient_checkpointing": False, "base_weights": "fp8"},
        8,
    ),
    "ours-30b-a3b-fp8-fitted": ("ours", "qwen3-30b-a3b", {**_EXPERTS, "base_weights": "fp8", "within_gib": 82.0}, 8),
    "ours-30b-a3b-general": ("ours", "qwen3-30b-a3b", {**_EXPERTS, "engine": "general"}, 6),
    "ours-gpt-oss-20b": ("ours", "gpt-oss-20b", {**_EXPERTS, "gradient_checkpointing": True}, 8),
    "ours-gpt-oss-20b-kept": ("ours", "gpt-oss-20b", _EXPERTS, 8),
    "ours-gpt-oss-20b-fp8": (
        "ours",
        "gpt-oss-20b",
        {**_EXPERTS, "gradient_checkpointing": True, "base_weights": "fp8"},
        8,
    ),
    "ours-gpt-oss-20b-general": ("ours", "gpt-oss-20b", {**_EXPERTS, "engine": "general"}, 6),
    "ours-moonlight-16b": ("ours", "moonlight-16b-a3b", {**_EXPERTS, "gradient_checkpointing": True}, 8),
    "ours-moonlight-16b-general": ("ours", "moonlight-16b-a3b", {**_EXPERTS, "engine": "general"}, 6),
    "ours-olmo3-7b": ("ours", "olmo3-7b", {**_KEPT, "gradient_checkpointing": False}, 11),
    "ours-olmo3-7b-fp8": ("ours", "olmo3-7b", {**_KEPT, "gradient_checkpointing": False, "base_weights": "fp8"}, 12),
    # Pairs: a step has as many tokens as the peer's 16 pairs.
    "ours-7b-dpo": ("ours", "qwen2.5-7b", {"objective": "dpo", "micro_batch": 16, "learning_rate": 1e-5}, 20),
    "trl-7b-dpo": (
        "trl",
        "qwen2.5-7b",
        {"dpo": True, "checkpointing": False, "batch": 4, "accumulation": 4},
        9,
    ),
    "trl-7b-dpo-lean": ("trl", "qwen2.5-7b", {"dpo": True, "checkpointing": True, "batch": 8, "accumulation": 2}, 9),
    # Eight trainings with the default steps, side by side; their tokens together.
    "ours-0.6b-sweep": ("ours", "qwen3-0.6b", {"sweep": {"learning_rates": _RATES}}, 30),
    "ours-0.6b-sweep-ranks": (
        "ours",
        "qwen3-0.6b",
        {"sweep": {"learning_rates": _RATES[:2], "ranks": [16, 64], "seeds": [0, 1]}},
        30,
    ),
    # The training stage from its start to its end, with held-out losses: eight candidates together, and one alone.
    "ours-0.6b-sweep-whole": ("ours", "qwen3-0.6b", {"whole": True, "sweep": {"learning_rates": _RATES}}, 200),
    "ours-0.6b-alone-whole": ("ours", "qwen3-0.6b", {"whole": True}, 200),
    "ours-7b-two": (
        "ours",
        "qwen2.5-7b",
        {**_KEPT, "micro_batch": 2, "gradient_checkpointing": False, "num_processes": 2},
        13,
    ),
    # One example a step, as long as its number says, and twice as long where two GPUs share it.
    **{
        f"ours-8b-long-{long // 1024}k{'-two' if number == 2 else ''}": (
            "ours",
            "llama3-8b",
            {
                **{"long": long, "rank": 16, "alpha": 32, "micro_batch": 1, "gradient_checkpointing": True},
                **{"num_processes": number, "context_parallel": number},
            },
            4,
        )
        for number, long in ((1, 131072), (1, 262144), (1, 524288), (2, 262144), (2, 524288), (2, 1048576))
    },
    # The same, each GPU with its part of the weights: what dividing a model costs that need not be divided.
    "ours-7b-fsdp": (
        "ours",
        "qwen2.5-7b",
        {**_KEPT, "micro_batch": 2, "gradient_checkpointing": False, "num_processes": 2, "strategy": "fsdp"},
        13,
    ),
    "ours-70b-fsdp": ("ours", "llama3-70b-24-layers", _DIVIDED, 10),
    "ours-70b-whole-fsdp": ("ours", "llama3-70b", _DIVIDED, 4),
    "ours-70b-whole-fsdp-fp8": ("ours", "llama3-70b", {**_DIVIDED, "base_weights": "fp8"}, 5),
    "ours-70b-fsdp-lean": ("ours", "llama3-70b-24-layers", {**_DIVIDED, "gradient_checkpointing": True}, 9),
    "ours-70b-fsdp-fp8": ("ours", "llama3-70b-24-layers", {**_DIVIDED, "base_weights": "fp8"}, 12),
    "ours-70b-fsdp-general": ("ours", "llama3-70b-24-layers", {**_DIVIDED, "engine": "general"}, 7),
    "trl-70b-fsdp": (
        "trl",
        "llama3-70b-24-layers",
        {"checkpointing": True, "batch": 8, "accumulation": 1, "num_processes": 2},
        7,
    ),
    "trl-70b-fsdp-kept": (
        "trl",
        "llama3-70b-24-layers",
        {"checkpointing": False, "batch": 4, "accumulation": 2, "num_processes": 2},
        7,
    ),
    "ours-0.6b-full": (
        "ours",
        "qwen3-0.6b",
        {**_FULL, "tokens_per_pack": 32768, "gradient_accumulation_steps": 2, "gradient_checkpointing": False},
        12,
    ),
    "ours-0.6b-full-general": (
        "ours",
        "qwen3-0.6b",
        {**_FULL, "tokens_per_pack": 32768, "gradient_accumulation_steps": 2, "engine": "general"},
        8,
    ),
    "ours-7b-full": ("ours", "qwen2.5-7b", _FULL_7B, 7),
    "ours-7b-full-8bit": ("ours", "qwen2.5-7b", {**_FULL_7B, **_EIGHT_BITS}, 7),
    # As much at its peak as TRL takes, and layers recomputed only where that is too short.
    "ours-7b-full-8bit-fitted": (
        "ours",
        "qwen2.5-7b",
        {**_FULL_7B, **_EIGHT_BITS, "gradient_checkpointing": None, "within_gib": 93.5},
        7,
    ),
    "unsloth-7b": ("unsloth", "qwen2.5-7b", {"checkpointing": False, "batch": 8, "accumulation": 2}, 10),
    "unsloth-7b-dropout": (
        "unsloth",
        "qwen2.5-7b",
        {"checkpointing": False, "batch": 8, "accumulation": 2, "dropout": 0.05},
        10,
    ),
    "unsloth-7b-lean": ("unsloth", "qwen2.5-7b", {"checkpointing": "unsloth", "batch": 8, "accumulation": 2}, 8),
    "unsloth-0.6b": ("unsloth", "qwen3-0.6b", {"checkpointing": False, "batch": 16, "accumulation": 2}, 12),
    "trl-7b": ("trl", "qwen2.5-7b", {"checkpointing": False, "batch": 8, "accumulation": 2}, 9),
    "trl-7b-lean": ("trl", "qwen2.5-7b", {"checkpointing": True, "batch": 8, "accumulation": 2}, 8),
    "trl-0.6b-full": ("trl", "qwen3-0.6b", {"full": True, "checkpointing": False, "batch": 16, "accumulation": 2}, 9),
    "trl-7b-full": ("trl", "qwen2.5-7b", {"full": True, "checkpointing": True, "batch": 4, "accumulation": 4}, 7),
    "trl-7b-full-8bit": (
        "trl",
        "qwen2.5-7b",
        {"full": True, "checkpointing": True, "batch": 4, "accumulation": 4, "optimizer": "adamw_torch_8bit"},
        7,
    ),
    "unsloth-qwen3.5-4b": (
        "unsloth",
        "qwen3.5-4b",
        {"checkpointing": False, "batch": 8, "accumulation": 2, "further_targets": _DELTA_NET},
        8,
    ),
    # transformers packs gated DeltaNets with the package causal-conv1d alone, and unpads with flash-attn alone.
    "trl-qwen3.5-4b": (
        "trl",
        "qwen3.5-4b",
        {"checkpointing": False, "batch": 16, "accumulation": 4, "packing": False, "attention": "sdpa"},
        8,
    ),
    "trl-qwen3.5-4b-lean": (
        "trl",
        "qwen3.5-4b",
        {"checkpointing": True, "batch": 32, "accumulation": 2, "packing": False, "attention": "sdpa"},
        8,
    ),
    "unsloth-gemma4-e4b": ("unsloth", "gemma4-e4b", {"checkpointing": False, "batch": 8, "accumulation": 2}, 8),
    # FlashAttention takes no heads of 512.
    "trl-gemma4-e4b": (
        "trl",
        "gemma4-e4b",
        {"checkpointing": False, "batch": 4, "accumulation": 4, "attention": "sdpa"},
        8,
    ),
    "unsloth-olmo3-7b": ("unsloth", "olmo3-7b", {"checkpointing": False, "batch": 8, "accumulation": 2}, 8),
    "trl-olmo3-7b": ("trl", "olmo3-7b", {"checkpointing": False, "batch": 8, "accumulation": 2}, 8),
    "unsloth-30b-a3b-lean": ("unsloth", "qwen3-30b-a3b", {**_PEERS_EXPERTS, "checkpointing": "unsloth"}, 7),
    "trl-30b-a3b-lean": (
        "trl",
        "qwen3-30b-a3b",
        {**_PEERS_EXPERTS, "checkpointing": True, "parameters": _EXPERT_PARAMETERS},
        6,
    ),
    "unsloth-gpt-oss-20b": ("unsloth", "gpt-oss-20b", {**_PEERS_EXPERTS, "checkpointing": "unsloth"}, 7),
    # Of the attentions with sinks this is the one that needs no hub; else eager.
    "trl-gpt-oss-20b": (
        "trl",
        "gpt-oss-20b",
        {**_PEERS_EXPERTS, "checkpointing": True, "parameters": _EXPERT_PARAMETERS, "attention": "flash_attention_4"},
        6,
    ),
    "trl-gpt-oss-20b-eager": (
        "trl",
        "gpt-oss-20b",
        {**_PEERS_EXPERTS, "checkpointing": True, "parameters": _EXPERT_PARAMETERS, "attention": "eager"},
        6,
    ),
    "trl-moonlight-16b": (
        "trl",
        "moonlight-16b-a3b",
        {**_PEERS_EXPERTS, "checkpointing": True, "parameters": _EXPERT_PARAMETERS},
        6,
    ),
    "llamafactory-7b-recipe": ("llamafactory", "qwen2.5-7b", {"batch": 2, "accumulation": 8}, 8),
    "llamafactory-0.6b-full": (
        "llamafactory",
        "qwen3-0.6b",
        {"full": True, "checkpointing": False, "packed_tokens": 32768, "batch": 1, "accumulation": 2},
        9,
    ),
    "llamafactory-7b-full": (
        "llamafactory",
        "qwen2.5-7b",
        {"full": True, "checkpointing": True, "packed_tokens": 8192, "batch": 1, "accumulation": 4},
        7,
    ),
}
# Rows of the table: what, ours, against, at least, and the most memory in GiB.
TABLE: list[tuple[str, str, str, float, float | None]] = [
    ("7B, bf16, no checkpointing", "ours-7b", "unsloth-7b", 1.3, None),
    ("7B, bf16, checkpointing", "ours-7b-lean", "unsloth-7b-lean", 1.2, 21.0),
    ("7B, FP8 base, no checkpointing", "ours-7b-fp8", "unsloth-7b", 1.75, None),
    ("7B, FP8 base, checkpointing", "ours-7b-fp8-lean", "unsloth-7b-lean", 1.7, 24.0),
    ("7B, defaults", "ours-7b-defaults", "llamafactory-7b-recipe", 11.0, None),
    ("7B, defaults, dropout 0.05", "ours-7b-dropout", "unsloth-7b-dropout", 1.1, None),
    ("7B, general engine, defaults", "ours-7b-general", "llamafactory-7b-recipe", 1.0, None),
    ("0.6B, defaults (small steps), beside packs", "ours-0.6b-defaults", "ours-0.6b", 0.5, None),
    ("0.6B, bf16", "ours-0.6b", "unsloth-0.6b", 1.5, None),
    ("Qwen3.5 4B, bf16", "ours-qwen3.5-4b", "unsloth-qwen3.5-4b", 1.3, None),
    ("Qwen3.5 4B, bf16, beside TRL's best", "ours-qwen3.5-4b", "trl-qwen3.5-4b", 1.3, None),
    ("Qwen3.5 4B, FP8 base", "ours-qwen3.5-4b-fp8", "unsloth-qwen3.5-4b", 1.3, None),
    ("Qwen3.5 4B, bf16, checkpointing", "ours-qwen3.5-4b-lean", "trl-qwen3.5-4b-lean", 1.3, None),
    ("Qwen3.5 4B, general engine", "ours-qwen3.5-4b-general", "trl-qwen3.5-4b-lean", 1.0, None),
    ("Gemma 4 E4B, bf16", "ours-gemma4-e4b", "unsloth-gemma4-e4b", 1.3, None),
    ("Gemma 4 E4B, FP8 base", "ours-gemma4-e4b-fp8", "unsloth-gemma4-e4b", 1.3, None),
    ("Gemma 4 E4B, bf16, beside TRL's best", "ours-gemma4-e4b", "trl-gemma4-e4b", 1.3, None),
    ("Gemma 4 E4B, general engine", "ours-gemma4-e4b-general", "trl-gemma4-e4b", 1.0, None),
    ("OLMo 3 7B, bf16", "ours-olmo3-7b", "unsloth-olmo3-7b", 1.3, None),
    ("OLMo 3 7B, FP8 base", "ours-olmo3-7b-fp8", "unsloth-olmo3-7b", 1.3, None),
    ("OLMo 3 7B, bf16, beside TRL's best", "ours-olmo3-7b", "trl-olmo3-7b", 1.3, None),
    ("Qwen3 30B-A3B, experts adapted, checkpointing", "ours-30b-a3b-lean", "unsloth-30b-a3b-lean", 2.0, 80.0),
    ("Qwen3 30B-A3B, beside TRL's best", "ours-30b-a3b-lean", "trl-30b-a3b-lean", 2.0, 80.0),
    ("Qwen3 30B-A3B, FP8 base, beside bf16", "ours-30b-a3b-fp8", "ours-30b-a3b-lean", 1.0, 50.0),
    ("Qwen3 30B-A3B, FP8 base, no checkpointing", "ours-30b-a3b-fp8-kept", "ours-30b-a3b-lean", 1.0, None),
    ("Qwen3 30B-A3B, FP8 base, beside Unsloth", "ours-30b-a3b-fp8-fitted", "unsloth-30b-a3b-lean", 2.0, 80.0),
    ("Qwen3 30B-A3B, beside the general engine", "ours-30b-a3b-lean", "ours-30b-a3b-general", 1.0, None),
    ("gpt-oss 20B, experts adapted, checkpointing", "ours-gpt-oss-20b", "unsloth-gpt-oss-20b", 1.3, None),
    ("gpt-oss 20B, beside TRL's best", "ours-gpt-oss-20b", "trl-gpt-oss-20b", 1.3, None),
    ("gpt-oss 20B, beside TRL with eager attention", "ours-gpt-oss-20b", "trl-gpt-oss-20b-eager", 1.3, None),
    ("gpt-oss 20B, FP8 base, beside bf16", "ours-gpt-oss-20b-fp8", "ours-gpt-oss-20b", 1.0, None),
    ("gpt-oss 20B, beside the general engine", "ours-gpt-oss-20b", "ours-gpt-oss-20b-general", 1.0, None),
    ("Moonlight 16B-A3B, experts adapted, checkpointing", "ours-moonlight-16b", "trl-moonlight-16b", 1.3, None),
    ("Moonlight 16B-A3B, beside the general engine", "ours-moonlight-16b", "ours-moonlight-16b-general", 1.0, None),
    ("7B, preferences (DPO)", "ours-7b-dpo", "trl-7b-dpo", 1.3, None),
    ("7B, preferences, beside TRL with checkpointing", "ours-7b-dpo", "trl-7b-dpo-lean", 1.3, None),
    ("0.6B, sweep of 8, beside one after the other", "ours-0.6b-sweep", "ours-0.6b-defaults", 1.8, None),
    ("0.6B, sweep of 8, the whole stage", "ours-0.6b-sweep-whole", "ours-0.6b-alone-whole", 1.8, None),
    ("0.6B, sweep of rates, ranks, seeds", "ours-0.6b-sweep-ranks", "ours-0.6b-defaults", 1.8, None),
    ("7B, bf16, two GPUs", "ours-7b-two", "ours-7b", 1.9, None),
    ("7B, bf16, two GPUs, weights divided", "ours-7b-fsdp", "ours-7b-two", 0.95, None),
    ("70B's layers, two GPUs, weights divided", "ours-70b-fsdp", "trl-70b-fsdp", 1.5, None),
    ("70B's layers, beside TRL without checkpointing", "ours-70b-fsdp", "trl-70b-fsdp-kept", 1.5, None),
    ("70B's layers, checkpointing", "ours-70b-fsdp-lean", "trl-70b-fsdp", 1.2, None),
    ("70B's layers, FP8 base", "ours-70b-fsdp-fp8", "trl-70b-fsdp", 2.0, None),
    ("70B's layers, beside the general engine", "ours-70b-fsdp", "ours-70b-fsdp-general", 1.0, None),
    ("7B, bf16, beside TRL's best", "ours-7b", "trl-7b", 1.0, None),
    ("7B, bf16, checkpointing, beside TRL's best", "ours-7b-lean", "trl-7b-lean", 1.0, None),
    ("0.6B, all weights", "ours-0.6b-full", "trl-0.6b-full", 1.2, None),
    ("0.6B, all weights, beside LLaMA-Factory", "ours-0.6b-full", "llamafactory-0.6b-full", 1.2, None),
    ("0.6B, all weights, beside the general engine", "ours-0.6b-full", "ours-0.6b-full-general", 1.0, None),
    ("7B, all weights, checkpointing", "ours-7b-full", "trl-7b-full", 1.2, None),
    ("7B, all weights, beside LLaMA-Factory", "ours-7b-full", "llamafactory-7b-full", 1.2, None),
    ("7B, all weights, 8-bit moments", "ours-7b-full-8bit", "trl-7b-full-8bit", 1.1, None),
    ("7B, all weights, 8-bit moments, same memory", "ours-7b-full-8bit-fitted", "trl-7b-full-8bit", 1.2, 88.0),
]
