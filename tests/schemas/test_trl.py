"""TRL's files for `trl sft --config`, in the manner of those that its documentation shows, become configs of ours."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.foreign import name_program, translate_any
from schemas.llamafactory.lines import NOT_GIVEN
from schemas.llamafactory.translation import Translation
from schemas.loading import parse_config
from tests.schemas.test_llamafactory import TRAIN

SFT = """
# ModelConfig
model_name_or_path: org/Model-0.5B
dtype: bfloat16
attn_implementation: kernels-community/flash-attn2
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: all-linear
# ScriptArguments
dataset_name: org/chats
dataset_num_proc: 12
# SFTConfig
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
eos_token: <|im_end|>
max_length: 2048
lr_scheduler_type: cosine
warmup_ratio: 0.03
bf16: true
logging_steps: 5
output_dir: data/Model-0.5B-SFT
report_to: [tensorboard]
push_to_hub: false
seed: 42
"""


def change(**keys: Any) -> dict[str, Any]:
    return {**yaml.safe_load(SFT), **keys}


def find(translation: Translation, key: str) -> tuple[str, str]:
    lines = [line for line in translation.lines if line.key == key]
    line = min(lines, key=lambda line: line.outcome != "refused")
    return line.outcome, line.text


def test_documented_file_becomes_a_config_that_loads() -> None:
    translation = translate_any(change())
    assert translation.program == "TRL"
    assert translation.list_lines("refused", "not done") == []
    assert translation.values == {
        "name": "data-Model-0.5B-SFT",
        "seed": 42,
        "registry": {"name": "data-Model-0.5B-SFT"},
        "model": {"base_model": "org/Model-0.5B"},
        "data": {"source": "org/chats"},
        "tokenization": {"max_length": 2048},
        "training": {
            "method": "lora", "rank": 32, "alpha": 16.0, "dropout": 0.05, "target_modules": ["all-linear"],
            "learning_rate": 2e-4, "num_epochs": 1.0, "checkpoint_every_steps": 500, "packing": True,
            "micro_batch": 2, "gradient_accumulation_steps": 8, "scheduler": "cosine", "warmup_fraction": 0.03,
            "report_to": ["tensorboard"],
        },
    }  # fmt: skip
    assert parse_config(translation.values).training.rank == 32


def test_every_key_that_is_given_has_a_line() -> None:
    given = change(surprise=1, dataset_text_field="text", chat_template_path="a.jinja", load_in_4bit=False, config="x")
    assert {line.key for line in translate_any(given).lines} >= given.keys()


def test_keys_that_are_not_given_have_trls_defaults() -> None:
    config = parse_config(translate_any({"model_name_or_path": "m", "dataset_name": "d", "output_dir": "x"}).values)
    training = config.training
    assert (training.method, training.learning_rate, training.num_epochs) == ("full", 2e-5, 3.0)
    assert (training.micro_batch, training.gradient_accumulation_steps) == (8, 1)
    assert (training.scheduler, training.warmup_fraction, training.packing) == ("linear", 0.0, False)
    assert (config.seed, config.tokenization.max_length, config.data.split) == (42, 1024, "train")
    with_peft = parse_config(translate_any({"model_name_or_path": "m", "dataset_name": "d", "use_peft": True}).values)
    assert (with_peft.training.rank, with_peft.training.alpha, with_peft.training.dropout) == (16, 32.0, 0.05)


@pytest.mark.parametrize(
    ("keys", "section", "expected"),
    [
        ({"use_peft": False}, "training", {"method": "full", "rank": None, "target_modules": None}),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "training", {"target_modules": ["q_proj", "v_proj"]}),
        ({"load_in_4bit": True}, "training", {"base_weights": "nf4"}),
        ({"gradient_checkpointing": False}, "training", {"gradient_checkpointing": False}),
        ({"max_steps": 100, "warmup_steps": 10}, "training", {"max_steps": 100, "warmup_fraction": 0.1}),
        ({"eval_strategy": "steps", "eval_steps": 100}, "training", {"eval_every_steps": 100}),
        ({"eval_strategy": "steps"}, "data", {"eval_source": "org/chats", "eval_split": "test"}),
        ({"dataset_test_split": "test_sft"}, "data", {"eval_source": None, "eval_split": None}),
        ({"dataset_train_split": "train_sft", "dataset_config": "en"}, "data", {"split": "train_sft", "subset": "en"}),
        ({"chat_template_path": "mine.jinja"}, "model", {"chat_template": "mine.jinja"}),
        ({"model_revision": "abc"}, "model", {"revision": "abc"}),
        (
            {"dataset_name": None, "datasets": [{"path": "a", "split": "x"}, {"path": "b", "name": "en"}]},
            "data",
            {"source": "a", "split": "x", "mixture": [{"source": "b", "subset": "en"}]},
        ),
    ],
)
def test_settings(keys: dict[str, Any], section: str, expected: dict[str, Any]) -> None:
    translation = translate_any(change(**keys))
    assert translation.list_lines("refused") == []
    found = translation.values[section]
    assert {name: found.get(name) for name in expected} == expected
    parse_config(translation.values)


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ({"dataset_streaming": True}, "dataset_streaming", "read whole"),
        ({"load_in_8bit": True}, "load_in_8bit", "4 bits"),
        ({"optim": "lion_8bit"}, "optim", "AdamW"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha", "no such method"),
        ({"lora_rr": 4}, "lora_rr", "did you mean lora_r?"),
        ({"lora_r": "many"}, "lora_r", "many"),
        (
            {"dataset_name": None, "datasets": [{"path": "a", "columns_": ["x"]}]},
            "datasets: columns_",
            "there are path",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(keys: dict[str, Any], key: str, words: str) -> None:
    outcome, text = find(translate_any(change(**keys)), key)
    assert outcome == "refused"
    assert words in text


def test_pefts_choice_of_modules_is_not_made_in_silence() -> None:
    outcome, text = find(translate_any(change(lora_target_modules=None)), "lora_target_modules")
    assert outcome == "not done"
    assert "all linear layers" in text


def test_whose_config_it_is() -> None:
    assert name_program(change()) == "TRL"
    assert name_program(yaml.safe_load(TRAIN)) == "LLaMA-Factory"
    assert name_program({"model_name_or_path": "m", "use_peft": True, "dataset": "a"}) == "LLaMA-Factory"
    assert name_program({"model": {"base_model": "m"}, "data": {"source": "a"}}) == ""
    assert NOT_GIVEN not in translate_any(change(), folder=Path()).values
