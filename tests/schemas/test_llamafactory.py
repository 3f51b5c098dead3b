"""LLaMA-Factory's files, in the manner of those that its documentation shows, become configs of ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.llamafactory.translation import Translation, is_llamafactory, translate
from schemas.loading import parse_config

TRAIN = """
### model
model_name_or_path: org/Model-4B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: identity,alpaca_en_demo
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: saves/model-4b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
EXPORT = """
model_name_or_path: org/Model-4B-Instruct
adapter_name_or_path: saves/model-4b/lora/sft
template: qwen3_nothink
trust_remote_code: true
export_dir: saves/merged
export_size: 5
export_device: cpu
export_legacy_format: false
"""
CHAT = """
model_name_or_path: org/Model-4B-Instruct
adapter_name_or_path: saves/model-4b/lora/sft
template: qwen3_nothink
infer_backend: huggingface
trust_remote_code: true
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(text: str = TRAIN, /, **keys: Any) -> dict[str, Any]:
    return {**yaml.safe_load(text), **keys}


def find(translation: Translation, key: str) -> tuple[str, str]:
    """Return the outcome and the text of a key's line; a refused one goes before its default's."""
    lines = [line for line in translation.lines if line.key == key]
    line = min(lines, key=lambda line: line.outcome != "refused")
    return line.outcome, line.text


def test_documented_training_becomes_a_config_that_loads(folder: Path) -> None:
    translation = translate(change())
    assert translation.kind == "train"
    assert translation.list_lines("refused", "not done") == []
    assert translation.values == {
        "name": "model-4b-lora-sft",
        "seed": 42,
        "registry": {"name": "model-4b-lora-sft"},
        "model": {"base_model": "org/Model-4B-Instruct"},
        "data": {
            "max_rows": 1000,
            "source": "data/dataset_info.json#identity",
            "mixture": [{"source": "data/dataset_info.json#alpaca_en_demo"}],
        },
        "tokenization": {"max_length": 2048, "truncation": "cut_answer"},
        "training": {
            "method": "lora", "rank": 8, "alpha": 16.0, "target_modules": ["all-linear"], "learning_rate": 1e-4,
            "num_epochs": 3.0,
            "checkpoint_every_steps": 500, "micro_batch": 1, "gradient_accumulation_steps": 8, "scheduler": "cosine",
            "warmup_fraction": 0.1,
        },
    }  # fmt: skip
    config = parse_config(translation.values)
    assert (config.training.dropout, config.training.packing, config.training.max_steps) == (0.0, False, None)


def test_the_routers_loss_keeps_its_coefficient(folder: Path) -> None:
    values = translate(change(moe_aux_loss_coef=0.01)).values
    assert values["training"]["router_aux_loss_coef"] == 0.01
    assert parse_config(values).training.router_aux_loss_coef == 0.01


def test_every_key_that_is_given_has_a_line(folder: Path) -> None:
    given = change(surprise=1, top_k=3, deepspeed={"zero_optimization": {"stage": 3}}, fsdp="full_shard")
    shown = {line.key for line in translate(given).lines}
    assert shown >= {key for key, value in given.items() if value is not None}


def test_keys_that_are_not_given_have_llamafactorys_defaults(folder: Path) -> None:
    config = parse_config(
        translate({"model_name_or_path": "m", "do_train": True, "dataset": "a", "output_dir": "x"}).values
    )
    training = config.training
    assert (training.rank, training.alpha, training.learning_rate, training.num_epochs) == (8, 16.0, 5e-5, 3.0)
    assert (training.micro_batch, training.gradient_accumulation_steps) == (8, 1)
    assert (training.scheduler, training.warmup_fraction, training.max_grad_norm) == ("linear", 0.0, 1.0)
    assert (config.seed, config.tokenization.max_length, config.data.source) == (42, 2048, "data/dataset_info.json#a")


@pytest.mark.parametrize(
    ("keys", "section", "expected"),
    [
        ({"learning_rate": "1e-4"}, "training", {"learning_rate": 1e-4}),
        ({"lora_alpha": 32}, "training", {"alpha": 32.0}),
        ({"lora_target": "q_proj, v_proj"}, "training", {"target_modules": ["q_proj", "v_proj"]}),
        ({"lora_rank": 16}, "training", {"rank": 16, "alpha": 32.0}),
        ({"use_dora": True, "use_rslora": True}, "training", {"use_dora": True, "use_rslora": True}),
        ({"lora_dropout": 0.05}, "training", {"dropout": 0.05}),
        ({"additional_target": "embed_tokens,lm_head"}, "training", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({"quantization_bit": 4, "quantization_method": "bnb"}, "training", {"base_weights": "nf4"}),
        ({"neat_packing": True}, "training", {"packing": True}),
        ({"packing": True}, "training", {"packing": True}),
        ({"max_steps": 200, "warmup_steps": 20}, "training", {"max_steps": 200, "warmup_fraction": 0.1}),
        ({"warmup_steps": 0.03}, "training", {"warmup_fraction": 0.03}),
        ({"warmup_steps": 0}, "training", {"warmup_fraction": 0.1}),
        ({"lr_scheduler_type": "constant_with_warmup"}, "training", {"scheduler": "constant", "warmup_fraction": 0.1}),
        ({"report_to": "tensorboard"}, "training", {"report_to": ["tensorboard"]}),
        ({"fsdp": "full_shard auto_wrap"}, "training", {"strategy": "fsdp"}),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "training", {"strategy": "zero3"}),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "training", {"strategy": "zero2"}),
        ({"eval_strategy": "steps", "eval_steps": 50}, "training", {"eval_every_steps": 50}),
        ({"evaluation_strategy": "steps", "eval_steps": 50}, "training", {"eval_every_steps": 50}),
        ({"disable_gradient_checkpointing": True}, "training", {"gradient_checkpointing": False}),
        ({"save_total_limit": 5}, "training", {"keep_checkpoints": 5}),
        ({"early_stopping_steps": 3}, "training", {"early_stopping_patience": 3, "keep": "last"}),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}, "training", {"keep": "best"}),
        ({"finetuning_type": "full", "lora_target": None}, "training", {"method": "full", "rank": None}),
        ({"finetuning_type": "freeze"}, "training", {"method": "freeze", "trained_layers": None}),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 4}, "training", {"trained_layers": 4}),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": -2, "freeze_extra_modules": "lm_head, norm"},
            "training",
            {"trained_layers": 0, "trained_modules": ["layers.0", "layers.1", "lm_head", "norm"]},
        ),
        ({"optim": "adamw_8bit"}, "training", {"optimizer": "adamw_8bit"}),
        ({"optim": "adamw_torch"}, "training", {"optimizer": None}),
        ({"mask_history": True}, "tokenization", {"train_on": "last_turn"}),
        ({"enable_thinking": False}, "tokenization", {"template_arguments": {"enable_thinking": False}}),
        ({"enable_thinking": True}, "tokenization", {"template_arguments": {"enable_thinking": True}}),
        ({"enable_thinking": None}, "tokenization", {"template_arguments": None}),
        ({"train_on_prompt": True}, "tokenization", {"train_on_prompt": True}),
        ({"val_size": 0.05}, "data", {"eval_fraction": 0.05}),
        ({"val_size": 0}, "data", {"eval_fraction": 0.0}),
        ({"val_size": 100}, "data", {"eval_fraction": 0.999, "max_eval_rows": 100}),
        ({"max_samples": None}, "data", {"source": "data/dataset_info.json#identity,alpaca_en_demo"}),
        ({"eval_dataset": "held"}, "data", {"eval_source": "data/dataset_info.json#held"}),
        ({"dataset": ["a"], "dataset_dir": "ONLINE"}, "data", {"source": "a", "format": "alpaca"}),
        ({"model_revision": "abc"}, "model", {"revision": "abc"}),
        ({"template": "llama3"}, "model", {"chat_template": "default:llama3"}),
        ({"template": "gemma2"}, "model", {"chat_template": "default:gemma"}),
        ({"template": "qwen"}, "model", {"chat_template": None}),
        ({"max_new_tokens": 64}, "evaluation", {"max_new_tokens": 64}),
    ],
)  # fmt: skip
def test_settings(folder: Path, keys: dict[str, Any], section: str, expected: dict[str, Any]) -> None:
    translation = translate(change(**keys))
    assert translation.list_lines("refused") == []
    found = translation.values[section]
    assert {name: found.get(name) for name in expected} == expected
    parse_config(translation.values)


FULL = """
model_name_or_path: org/Model-4B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: identity,alpaca_en_demo
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/model-4b/full/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""


@pytest.mark.parametrize("num_processes", [1, 8])
def test_documented_full_training_becomes_a_config_that_loads(folder: Path, num_processes: int) -> None:
    (folder / "examples" / "deepspeed").mkdir(parents=True)
    stage = {"zero_optimization": {"stage": 3, "overlap_comm": False}, "bf16": {"enabled": "auto"}}
    (folder / "examples" / "deepspeed" / "ds_z3_config.json").write_text(json.dumps(stage))
    translation = translate(change(FULL), num_processes=num_processes)
    assert translation.list_lines("refused", "not done") == []
    training = parse_config(translation.values).training
    assert (training.method, training.strategy, training.learning_rate) == ("full", "zero3", 1e-5)
    assert training.num_processes == num_processes
    assert training.micro_batch * training.gradient_accumulation_steps == 2 * num_processes


def test_loras_keys_are_of_no_effect_without_it(folder: Path) -> None:
    translation = translate(change(finetuning_type="full", lora_alpha=3, freeze_trainable_layers=2))
    for key in ("lora_rank", "lora_target", "lora_alpha", "freeze_trainable_layers"):
        assert find(translation, key) == ("implied", "of no effect with finetuning_type full")
    assert parse_config(translation.values).training.method == "full"


def test_constant_schedule_has_no_warm_up_there_and_none_here(folder: Path) -> None:
    translation = translate(change(lr_scheduler_type="constant"))
    assert "warmup_fraction" in translation.values["training"]
    assert translation.values["training"]["warmup_fraction"] == 0.0
    assert find(translation, "warmup_ratio")[0] == "becomes"


def test_stage_dpo_learns_preferences(folder: Path) -> None:
    translation = translate(change(stage="dpo", pref_beta=0.2, pref_loss="hinge", pref_ftx=0.0))
    config = parse_config(translation.values)
    assert config.training.objective == "dpo"
    assert (config.training.dpo.beta, config.training.dpo.loss) == (0.2, "hinge")
    assert config.registry.gate.metric == "preference_loss"
    assert find(translation, "pref_ftx")[0] == "implied"
    assert find(translate(change(pref_beta=0.2)), "pref_beta") == ("implied", "it has no effect in this stage")


def test_batches_are_meant_per_device(folder: Path) -> None:
    training = translate(change(), num_processes=4).values["training"]
    assert (training["micro_batch"], training["gradient_accumulation_steps"], training["num_processes"]) == (1, 32, 4)
    parse_config(translate(change(), num_processes=4).values)


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ({"stage": "kto"}, "stage", "and no other stage"),
        ({"stage": "dpo", "pref_loss": "simpo"}, "pref_loss", "there are sigmoid, hinge, ipo"),
        ({"stage": "dpo", "pref_ftx": 0.5}, "pref_ftx", "set it to 0"),
        ({"finetuning_type": "oft"}, "finetuning_type", "there are lora, full and freeze"),
        (
            {"finetuning_type": "freeze", "freeze_trainable_modules": "mlp"},
            "freeze_trainable_modules",
            "name modules in training.trained_modules",
        ),
        ({"adapter_name_or_path": "saves/a"}, "adapter_name_or_path", "merge the adapter first"),
        ({"quantization_bit": 8}, "quantization_bit", "NF4"),
        ({"optim": "lion_8bit"}, "optim", "AdamW"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type", "there are cosine, linear, constant"),
        ({"warmup_steps": 20}, "warmup_steps", "write warmup_ratio"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha", "no such method"),
        ({"streaming": True}, "streaming", "read whole"),
        ({"mix_strategy": "interleave_under"}, "mix_strategy", "data.mixture"),
        ({"deepspeed": "nowhere/ds_z3.json"}, "deepspeed", "cannot be read"),
        ({"dataset_dir": "elsewhere"}, "dataset_dir", "elsewhere/dataset_info.json: no such file"),
        ({"dataset_dir": "REMOTE:org/info"}, "dataset_dir", "ONLINE"),
        ({"eval_dataset": "held", "val_size": 0.1}, "val_size", "excludes eval_dataset"),
        ({"mask_history": True, "train_on_prompt": True}, "mask_history", "excludes train_on_prompt"),
        ({"lora_rnk": 4}, "lora_rnk", "did you mean lora_rank?"),
        ({"lora_rank": "many"}, "lora_rank", "many"),
        ({"per_device_train_batch_size": "two"}, "per_device_train_batch_size", "two"),
        ({"num_train_epochs": True}, "num_train_epochs", "a number is wanted"),
        ({"use_dora": "maybe"}, "use_dora", "true or false is wanted"),
        ({"default_system": "Be brief."}, "default_system", "into the rows"),
    ],
)
def test_what_cannot_be_is_refused_by_name(folder: Path, keys: dict[str, Any], key: str, words: str) -> None:
    outcome, text = find(translate(change(**keys)), key)
    assert outcome == "refused"
    assert words in text


def test_same_training_without_something_beside_it_is_said(folder: Path) -> None:
    assert find(translate(change(report_to="wandb")), "report_to") == (
        "not done",
        "the curves go to MLflow and TensorBoard",
    )
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert find(translate(change(deepspeed=offload)), "deepspeed: offload_optimizer")[0] == "not done"


def test_paths_are_found_from_the_files_folder_and_above(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "examples" / "deepspeed").mkdir(parents=True)
    stage = {"zero_optimization": {"stage": 2}}
    (folder / "examples" / "deepspeed" / "ds_z2_config.json").write_text(json.dumps(stage))
    monkeypatch.chdir("/")
    keys = change(deepspeed="examples/deepspeed/ds_z2_config.json", max_samples=None)
    values = translate(keys, folder=folder / "examples" / "train_lora").values
    assert values["training"]["strategy"] == "zero2"
    assert values["data"]["source"] == f"{folder}/data/dataset_info.json#identity,alpaca_en_demo"


def test_export() -> None:
    translation = translate(change(EXPORT))
    assert (translation.kind, translation.list_lines("refused")) == ("export", [])
    assert translation.values == {
        "base_model": "org/Model-4B-Instruct",
        "adapter": "saves/model-4b/lora/sft",
        "folder": "saves/merged",
        "max_shard_size": "5GB",
    }
    assert find(translate(change(EXPORT, export_quantization_bit=4)), "export_quantization_bit")[0] == "refused"
    assert find(translate(change(EXPORT, adapter_name_or_path=None)), "adapter_name_or_path")[0] == "refused"
    assert find(translate(change(EXPORT, adapter_name_or_path="a,b")), "adapter_name_or_path")[0] == "refused"


def test_chat() -> None:
    translation = translate(change(CHAT))
    assert (translation.kind, translation.list_lines("refused")) == ("chat", [])
    assert translation.values == {
        "base_model": "org/Model-4B-Instruct",
        "adapter": "saves/model-4b/lora/sft",
        "temperature": 0.95,
        "max_new_tokens": 1024,
    }
    assert translate(change(CHAT, do_sample=False)).values["temperature"] == 0.0
    assert find(translate(change(CHAT, top_p=0.7)), "top_p")[0] == "not done"


def test_a_config_of_ours_is_not_taken_for_one_of_llamafactorys() -> None:
    assert is_llamafactory(change())
    assert not is_llamafactory({"model": {"base_model": "m"}, "data": {"source": "a"}})
    assert not is_llamafactory(["model_name_or_path"])
