"""LLaMA-Factory's files through the commands: run, import, export and chat, on a model small enough to train here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.importing import count_devices, load_any
from schemas.config import RunConfig, TrainingConfig
from schemas.loading import ConfigError, load_config, parse_config
from tasks.models import load_model
from tasks.training.checkpoints import Progress, take_snapshot, write_snapshot
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.process.messages import TrainingJob, write_job
from tests.schemas.test_llamafactory import TRAIN

_TOKENIZER = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "base_model"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder as LLaMA-Factory's users have it: data/ with its index, and the config."""
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"identity": {"file_name": "identity.json"}}))
    (tmp_path / "my_sft.yaml").write_text(TRAIN)
    return tmp_path


def test_the_name_of_a_file_adds_no_line_to_the_config(place: Path) -> None:
    file = place / "a\nseed: 1\x1b[2J.yaml"
    file.write_text(TRAIN)
    said = CliRunner().invoke(app, ["import", str(file)])
    assert said.exit_code == 0, said.output
    assert "\x1b" not in said.output
    assert yaml.safe_load(said.stdout)["seed"] == 42
    assert [line for line in said.stdout.splitlines() if line.startswith("seed: 1")] == []


@pytest.fixture
def models(place: Path) -> tuple[Path, Path]:
    """A tiny base model with the demo's tokenizer, and an adapter on it in PEFT's format."""
    tokenizer: Any = AutoTokenizer.from_pretrained(_TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    base, adapter = place / "base", place / "saves" / "adapter"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    untyped: Any = Qwen3ForCausalLM.from_pretrained(base)
    adapted = get_peft_model(untyped, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(adapter))
    return base, adapter


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def write(path: Path, **keys: Any) -> Path:
    path.write_text(yaml.safe_dump(keys))
    return path


def test_import_writes_a_config_of_ours_and_the_table_beside_it(place: Path) -> None:
    result = call("import", "my_sft.yaml", "learning_rate=2e-5", "report_to=wandb", "dataset=identity")
    assert result.exit_code == 0, result.output
    (place / "ours.yaml").write_text(result.stdout)
    config = load_config(place / "ours.yaml")
    assert (config.training.learning_rate, config.training.rank) == (2e-5, 8)
    assert "not done" in result.stdout  # as a comment
    assert "training.warmup_fraction = 0.1" in result.stderr
    assert "wandb" in result.stderr
    assert config == load_any(place / "my_sft.yaml", ("learning_rate=2e-5", "report_to=wandb", "dataset=identity"))


def test_import_names_all_that_cannot_be_and_writes_nothing(place: Path) -> None:
    result = call("import", "my_sft.yaml", "stage=ppo", "neftune_noise_alpha=5")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "2 keys of LLaMA-Factory's that cannot be translated" in result.stderr
    ours = call("import", Path(__file__).resolve().parents[2] / "deploy" / "configs" / "demo.yaml")
    assert ours.exit_code == 1
    assert "none of LLaMA-Factory's, TRL's or Axolotl's" in ours.stderr


def test_overrides_are_over_the_files_own_keys_and_set_is_over_ours(place: Path) -> None:
    config = load_any(place / "my_sft.yaml", ("lora_rank=16",), ("evaluation.max_examples=3",))
    assert isinstance(config, RunConfig)
    assert (config.training.rank, config.training.alpha, config.evaluation.max_examples) == (16, 32.0, 3)
    ours = write(place / "ours.yaml", model={"base_model": "m"}, data={"source": "d"})
    config = load_any(ours, ("training.rank=4",))
    assert isinstance(config, RunConfig)
    assert config.training.rank == 4


def test_devices_are_those_that_llamafactory_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    for visible, number in (("", 1), ("-1", 1), ("0", 1), ("0,1,3", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert count_devices() == number
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    assert count_devices() == 8
    monkeypatch.setenv("NPROC_PER_NODE", "all")
    with pytest.raises(ConfigError, match="NPROC_PER_NODE = 'all'"):
        count_devices()


def test_export_merges_and_proves(place: Path, models: tuple[Path, Path]) -> None:
    base, adapter = models
    keys = {"model_name_or_path": str(base), "adapter_name_or_path": str(adapter), "template": "qwen3_nothink"}
    path = write(place / "merge.yaml", **keys, export_dir="merged", export_size=5, export_device="cpu")
    result = call("run", path)
    assert result.exit_code == 0, result.output
    assert "100.0% of the greedy tokens agree" in result.stderr
    merged, before = load_file(place / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    assert torch.allclose(merged[f"{name}.weight"], before[f"{name}.weight"] + 2 * b @ a, atol=1e-5)
    assert (place / "merged" / "tokenizer.json").is_file()
    again = call("run", path)
    assert again.exit_code == 1
    assert "is not empty" in again.stderr


def test_export_of_an_adapter_that_does_nothing_leaves_no_folder(place: Path, models: tuple[Path, Path]) -> None:
    base, adapter = models
    tensors = load_file(adapter / "adapter_model.safetensors")
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor * (".lora_A." in name) for name, tensor in tensors.items()}, file, {"format": "pt"})
    path = write(
        place / "merge.yaml", model_name_or_path=str(base), adapter_name_or_path=str(adapter), export_dir="merged"
    )
    result = call("run", path)
    assert result.exit_code == 1
    assert "the training changed nothing" in result.stderr
    assert not (place / "merged").exists()


def test_chat_answers_with_the_adapter(place: Path, models: tuple[Path, Path]) -> None:
    base, adapter = models
    keys = {"model_name_or_path": str(base), "template": "qwen3_nothink", "do_sample": False, "max_new_tokens": 8}
    merge = write(
        place / "merge.yaml", model_name_or_path=str(base), adapter_name_or_path=str(adapter), export_dir="merged"
    )
    assert call("run", merge).exit_code == 0
    answers = {
        name: call("chat", target, "--prompt", "Who are you?", "--max-tokens", "8")
        for name, target in {
            "base": write(place / "base.yaml", **keys),
            "adapter": write(place / "chat.yaml", **keys, adapter_name_or_path=str(adapter)),
            "folder": adapter,
            "merged": place / "merged",
        }.items()
    }
    assert {result.exit_code for result in answers.values()} == {0}, [result.output for result in answers.values()]
    assert answers["adapter"].stdout == answers["folder"].stdout == answers["merged"].stdout
    assert answers["adapter"].stdout != answers["base"].stdout


def test_an_adapter_that_is_nowhere_is_told_with_what_would_have_made_it(place: Path) -> None:
    keys = {"model_name_or_path": str(_TOKENIZER), "adapter_name_or_path": "saves/mine/lora/sft"}
    for words in (
        ("run", write(place / "merge.yaml", **keys, export_dir="merged")),
        ("chat", write(place / "chat.yaml", **keys), "--prompt", "x"),
    ):
        result = call(*words)
        assert result.exit_code == 1
        told = " ".join(result.stderr.split())
        assert "saves/mine/lora/sft: there is no such folder, and no registered model mine-lora-sft" in told
        assert "train first" in told


def test_merge_takes_an_adapter_or_a_checkpoint(place: Path, models: tuple[Path, Path]) -> None:
    base, adapter = models
    result = call("merge", adapter, "merged", "--base-model", base)
    assert result.exit_code == 0, result.output
    # A checkpoint as a training leaves it: beside its job, with the names of what was trained.
    config = TrainingConfig(rank=4, alpha=8)
    job = TrainingJob(base, place / "tokens", place / "run", config, seed=0, identity="this")
    (place / "run").mkdir()
    write_job(job, place / "run" / "job.json")
    (place / "tokens" / "tokenizer").mkdir(parents=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(place / "tokens" / "tokenizer")
    parameters = collect_trained(attach_adapter(load_model(base), config, seed=0))
    saved = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name.replace(".default.weight", ".weight")])
    snapshot = take_snapshot(
        parameters=parameters, optimizer=torch.optim.AdamW(parameters.values()), progress=Progress(7), identity="this"
    )
    assert snapshot is not None
    checkpoint = write_snapshot(snapshot, place / "run" / "checkpoints", keep=1)
    result = call("merge", checkpoint, "again")
    assert result.exit_code == 0, result.output
    one, other = (load_file(place / name / "model.safetensors") for name in ("merged", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    asked = [call("chat", target, "--prompt", "Who?", "--max-tokens", "6").stdout for target in (checkpoint, "again")]
    assert asked[0] == asked[1] != ""
    assert "none of adapter_config.json, trained_config.json there" in call("merge", place / "data", "none").stderr


def test_files_for_another_command_say_which(place: Path) -> None:
    chat = write(place / "chat.yaml", model_name_or_path="m", template="qwen")
    result = call("run", chat)
    assert result.exit_code == 1
    assert f"sft chat {chat}" in result.stderr.replace("\n", "")
    assert "not a chat config of LLaMA-Factory's" in call("chat", "my_sft.yaml").stderr


def test_trls_file_is_run_and_imported_by_the_same_commands(place: Path) -> None:
    sft = write(place / "sft.yaml", model_name_or_path="m", dataset_name="d", use_peft=True, lora_r=4, output_dir="x")
    result = call("import", sft)
    assert result.exit_code == 0, result.output
    assert "TRL's config here" in result.stderr
    assert result.stdout.startswith("# From sft.yaml of TRL.")
    assert parse_config(yaml.safe_load(result.stdout)).training.rank == 4
    bad = write(place / "bad.yaml", model_name_or_path="m", dataset_name="d", load_in_8bit=True)
    refused = call("run", bad)
    assert refused.exit_code == 1
    assert "1 key of TRL's that cannot be translated" in refused.stderr
