"""LLaMA-Factory's keys that are a setting of ours under another name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schemas.llamafactory.lines import to_flag, to_names, to_number, to_whole


@dataclass(frozen=True)
class Setting:
    """A key that is a setting of ours under another name."""

    field: str
    convert: Callable[[Any], Any]
    default: Any = None
    """LLaMA-Factory's; None: ours holds where the key is not given."""


SETTINGS: dict[str, Setting] = {
    "model_name_or_path": Setting("model.base_model", str),
    "seed": Setting("seed", to_whole, 42),
    "max_samples": Setting("data.max_rows", to_whole),
    "cutoff_len": Setting("tokenization.max_length", to_whole, 2048),
    "train_on_prompt": Setting("tokenization.train_on_prompt", to_flag, False),
    "moe_aux_loss_coef": Setting("training.router_aux_loss_coef", to_number),
    "learning_rate": Setting("training.learning_rate", to_number, 5e-5),
    "weight_decay": Setting("training.weight_decay", to_number, 0.0),
    "max_grad_norm": Setting("training.max_grad_norm", to_number, 1.0),
    "num_train_epochs": Setting("training.num_epochs", to_number, 3.0),
    "save_steps": Setting("training.checkpoint_every_steps", to_whole, 500),
    "save_total_limit": Setting("training.keep_checkpoints", to_whole),
    "early_stopping_steps": Setting("training.early_stopping_patience", to_whole),
    "max_new_tokens": Setting("evaluation.max_new_tokens", to_whole),
    "gradient_checkpointing": Setting("training.gradient_checkpointing", lambda value: to_flag(value) or None),
    "activation_checkpointing": Setting("training.gradient_checkpointing", lambda value: to_flag(value) or None),
}

LORA: dict[str, Setting] = {
    "lora_rank": Setting("training.rank", to_whole, 8),
    "lora_dropout": Setting("training.dropout", to_number, 0.0),
    "use_rslora": Setting("training.use_rslora", to_flag, False),
    "use_dora": Setting("training.use_dora", to_flag, False),
    "additional_target": Setting("training.modules_to_save", to_names),
}
"""The same with finetuning_type lora; without it they are of no effect."""

TEMPLATES: dict[str, str] = {
    **dict.fromkeys(
        (
            "chatml",
            "chatml_de",
            "qwen",
            "qwen2_5",
            "qwen3",
            "qwen3_nothink",
            "yi",
            "hermes2",
            "intern2",
            "smollm",
            "smollm2",
            "dbrx",
            "orion_chatml",
        ),
        "chatml",
    ),
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), "llama3"),
    **dict.fromkeys(("llama2", "llama2_zh"), "llama2"),
    **dict.fromkeys(("mistral", "ministral", "mistral_small"), "mistral"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), "gemma"),
    **dict.fromkeys(("phi", "phi_small"), "phi3"),
    "phi4": "phi4",
    "deepseek": "deepseek",
    **dict.fromkeys(("deepseek3", "deepseekv3"), "deepseek3"),
    "zephyr": "zephyr",
    "vicuna": "vicuna",
    "alpaca": "alpaca",
    **dict.fromkeys(("default", "empty"), "plain"),
}
"""Their names of chat templates, and ours for a tokenizer that has none of its own."""
