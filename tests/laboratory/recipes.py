"""Configs of every kind that can be given: all shipped ones, ways to train, and files of TRL and of Axolotl."""

from pathlib import Path
from random import Random
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
_TRAINING: dict[str, tuple[Any, ...]] = {
    "method": ("lora", "full", "freeze"),
    "optimizer": ("adamw", "adamw_8bit"),
    "keep": ("best", "last"),
    "trained_layers": (0, 1, 2, 10**6),
    "base_weights": ("auto", "bf16", "fp8", "nf4"),
    "strategy": ("auto", "ddp", "fsdp", "zero2", "zero3"),
    "base_dropout": (True, False),
    "router_aux_loss_coef": (0.0, 0.01),
    "rank": (1, 64),
    "tokens_per_pack": ("auto", 512, 0),
}
_TRL: dict[str, Any] = {
    "model_name_or_path": "org/Model-0.5B",
    "dtype": "bfloat16",
    "use_peft": True,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_modules": "all-linear",
    "dataset_name": "org/chats",
    "learning_rate": 2.0e-4,
    "num_train_epochs": 1,
    "packing": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "eos_token": "<|im_end|>",
    "max_length": 2048,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "optim": "adamw_8bit",
    "output_dir": "out",
    "report_to": ["tensorboard"],
    "seed": 42,
}
_AXOLOTL: dict[str, Any] = {
    "base_model": "org/Model-1B",
    "load_in_4bit": False,
    "datasets": [{"path": "org/alpaca", "type": "alpaca"}, {"path": "org/chats", "type": "chat_template"}],
    "val_set_size": 0,
    "adapter": "lora",
    "lora_model_dir": None,
    "sequence_len": 2048,
    "sample_packing": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["q_proj", "down_proj"],
    "gradient_accumulation_steps": 2,
    "micro_batch_size": 2,
    "num_epochs": 1,
    "optimizer": "adamw_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "warmup_ratio": 0.1,
    "special_tokens": {"pad_token": "<|end_of_text|>"},
    "unfrozen_parameters": ["model.layers.1.*"],
}


def draw_recipe(draw: Random) -> Any:
    """Return a shipped config, in half of the cases with another way to train or to hold out rows."""
    file = draw.choice(sorted((ROOT / "deploy" / "configs").glob("*.yaml")))
    values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    if draw.random() < 0.5:
        training = dict(values.get("training") or {})
        for name in draw.sample(sorted(_TRAINING), draw.choice((1, 2, 3))):
            training[name] = draw.choice(_TRAINING[name])
        values["training"] = training
    if draw.random() < 0.3:
        values["data"] = {**values["data"], "eval_fraction": draw.choice((0, 0.0, 0.5, 1, "0"))}
    return values


def draw_llamafactory_method(draw: Random) -> dict[str, Any]:
    """Return what LLaMA-Factory's files have of ways to train."""
    methods: tuple[dict[str, Any], ...] = (
        {"finetuning_type": "full", "pure_bf16": draw.random() < 0.5},
        {"finetuning_type": "freeze", "freeze_trainable_layers": draw.choice((2, 0, -2))},
        {"finetuning_type": "freeze", "freeze_trainable_modules": "all", "freeze_extra_modules": "lm_head"},
        {"optim": "adamw_8bit", "val_size": 0},
    )
    return draw.choice(methods)


def draw_other_program(draw: Random) -> dict[str, Any]:
    """Return most keys of a file of TRL's or Axolotl's."""
    return {key: value for key, value in draw.choice((_TRL, _AXOLOTL)).items() if draw.random() < 0.92}
