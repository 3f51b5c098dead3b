"""Axolotl's files, in the manner of its examples, become configs of ours."""

from typing import Any

import pytest
import yaml

from schemas.foreign import name_program, translate_any
from schemas.llamafactory.translation import Translation
from schemas.loading import parse_config

LORA = """
base_model: org/Model-1B
load_in_8bit: false
load_in_4bit: false
datasets:
  - path: org/alpaca
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - gate_proj
  - down_proj
  - up_proj
  - q_proj
wandb_project:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""


def change(**keys: Any) -> dict[str, Any]:
    return {**yaml.safe_load(LORA), **keys}


def find(translation: Translation, key: str) -> tuple[str, str]:
    lines = [line for line in translation.lines if line.key == key]
    line = min(lines, key=lambda line: line.outcome != "refused")
    return line.outcome, line.text


def test_example_becomes_a_config_that_loads() -> None:
    translation = translate_any(change())
    assert translation.program == "Axolotl"
    assert translation.list_lines("refused") == []
    assert translation.list_lines("not done") == []
    assert translation.values == {
        "name": "lora-out",
        "seed": 42,
        "registry": {"name": "lora-out"},
        "model": {"base_model": "org/Model-1B"},
        "data": {"source": "org/alpaca", "format": "alpaca", "eval_fraction": 0.1},
        "tokenization": {"max_length": 2048},
        "training": {
            "method": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.05,
            "target_modules": ["gate_proj", "down_proj", "up_proj", "q_proj"], "learning_rate": 2e-4, "num_epochs": 1.0,
            "weight_decay": 0.0, "optimizer": "adamw_8bit",
            "packing": True, "micro_batch": 2, "gradient_accumulation_steps": 2,
            "scheduler": "cosine", "warmup_fraction": 0.1,
        },
    }  # fmt: skip
    parse_config(translation.values)


def test_every_key_that_is_given_has_a_line() -> None:
    given = change(surprise=1, wandb_entity="me", chat_template="chatml", test_datasets=[], fsdp=["full_shard"])
    shown = {line.key for line in translate_any(given).lines}
    assert shown >= {key for key, value in given.items() if value not in (None, [])}


@pytest.mark.parametrize(
    ("keys", "section", "expected"),
    [
        ({"adapter": None}, "training", {"method": "full", "rank": None, "target_modules": None}),
        ({"adapter": "qlora", "load_in_4bit": True}, "training", {"method": "lora", "base_weights": "nf4"}),
        ({"lora_target_linear": True}, "training", {"target_modules": ["all-linear"]}),
        ({"max_steps": 100, "warmup_steps": 10}, "training", {"max_steps": 100, "warmup_fraction": 0.1}),
        ({"fsdp": ["full_shard", "auto_wrap"]}, "training", {"strategy": "fsdp"}),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "training", {"strategy": "zero3"}),
        ({"val_set_size": 0}, "data", {"eval_fraction": 0.0}),
        ({"val_set_size": 50}, "data", {"eval_fraction": 0.999, "max_eval_rows": 50}),
        ({"test_datasets": [{"path": "t", "split": "test"}]}, "data", {"eval_source": "t", "eval_split": "test"}),
        ({"chat_template": "llama3"}, "model", {"chat_template": "default:llama3"}),
        ({"chat_template": "tokenizer_default_fallback_gemma"}, "model", {"chat_template": "default:gemma"}),
        (
            {"datasets": [{"path": "json", "data_files": "a.jsonl"}, {"path": "b", "name": "en"}]},
            "data",
            {"source": "a.jsonl", "format": None, "mixture": [{"source": "b", "subset": "en"}]},
        ),
    ],
)  # fmt: skip
def test_settings(keys: dict[str, Any], section: str, expected: dict[str, Any]) -> None:
    translation = translate_any(change(**keys))
    assert translation.list_lines("refused") == []
    found = translation.values[section]
    assert {name: found.get(name) for name in expected} == expected
    parse_config(translation.values)


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ({"rl": "dpo"}, "rl", "supervised fine-tuning"),
        ({"optimizer": "lion_8bit"}, "optimizer", "AdamW"),
        ({"lr_scheduler": "polynomial"}, "lr_scheduler", "there are cosine"),
        ({"micro_batch_size": "two"}, "micro_batch_size", "two"),
        ({"datasets": [{"path": "a", "type": "completion"}]}, "datasets: type", "there are alpaca"),
        ({"datasets": ["a"]}, "datasets", "a mapping with a path"),
        ({"lora_rr": 4}, "lora_rr", "did you mean lora_r?"),
        ({"adapter": None, "load_in_4bit": True}, "load_in_4bit", "never packed"),
    ],
)
def test_what_cannot_be_is_refused_by_name(keys: dict[str, Any], key: str, words: str) -> None:
    outcome, text = find(translate_any(change(**keys)), key)
    assert outcome == "refused"
    assert words in text


def test_whose_config_it_is() -> None:
    assert name_program(change()) == "Axolotl"
    assert name_program({"model": {"base_model": "m"}, "data": {"source": "a"}}) == ""
