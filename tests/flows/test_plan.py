"""`sft plan` says what a run would do, in text and as JSON, and refuses what the run would refuse."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from flows import gpu_stages
from flows.cli import app
from schemas.config import TrainingConfig
from tasks.speeds import read_speeds
from tasks.training.records import TrainingError
from tests.flows.test_first_config import MODEL, write_rows


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(folder))
        patch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(folder / "results"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


@pytest.fixture(scope="module")
def config(home: Path) -> Path:
    data = write_rows(home / "rows.jsonl", 200, "A fact about number")
    path = home / "mine.yaml"
    values = {"name": "mine", "model": {"base_model": str(MODEL)}, "data": {"source": str(data), "eval_fraction": 0.2}}
    path.write_text(yaml.safe_dump({**values, "training": {"rank": 4, "num_epochs": 2.5}}))
    return path


def plan(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *words, "--json"])
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def test_counts_are_those_of_the_data_and_unknown_times_are_said(config: Path) -> None:
    made = plan(str(config), "--rate", "3.5")
    assert made["rows"] == {
        "rows in": 200,
        "to train": 160,
        "held out": 40,
        "duplicates": 0,
        "leaked": 0,
        "rejected": 0,
    }
    assert made["sizes"]["num_steps"] == {"value": 25, "low": 25, "high": 25}  # 10 an epoch, 2.5 epochs
    assert made["num_eval_examples"] == 40
    assert made["cached"] == []
    assert made["seconds"] is made["price"] is None
    text = CliRunner().invoke(app, ["plan", str(config), "--rate", "3.5"]).stdout
    assert "time      unknown on this machine until a run has been done here. --measure trains eight steps" in text
    assert "price     unknown, as the time is" in text
    assert "25, 10 an epoch" in text


def test_eight_steps_make_the_pace_known(config: Path) -> None:
    made = plan(str(config), "--measure")
    steps = next(time for time in made["times"] if time["stage"] == "train: steps")
    (noted,) = [speed for speed in read_speeds() if speed.stage == "train: steps"]
    assert noted.peak_memory_bytes == made["memory"]["seen_peak_bytes"] > 0
    whole = noted.seconds / noted.units * made["sizes"]["seen_tokens"]["value"]
    assert steps["seconds"]["value"] == pytest.approx(whole, rel=0.02)  # padding, which no two epochs share out alike
    other = plan(str(config), "--set", "training.rank=8")
    rough = next(time for time in other["times"] if time["stage"] == "train: steps")
    widths = [each["seconds"]["high"] / each["seconds"]["value"] for each in (steps, rough)]
    assert widths[0] < widths[1]
    assert rough["source"] == "1 earlier run of this model"
    unlike = plan(str(config), "--set", "training.use_dora=true")
    told = next(time for time in unlike["times"] if time["stage"] == "train: steps")
    assert told["source"] == "1 earlier run of this model with other use_dora"
    held_out = next(time for time in made["times"] if time["stage"] == "train: held-out losses")
    assert held_out["source"] == "not measured: a third of a step's pace"  # the trial has none
    assert held_out["seconds"]["value"] > 0
    peak = made["memory"]["peak_bytes"]
    assert peak["low"] < noted.peak_memory_bytes + 90e6 < peak["high"]  # what a run's process holds more


def test_help_names_the_configs_that_are_taken() -> None:
    text = " ".join(CliRunner().invoke(app, ["plan", "--help"]).output.replace("│", "").split())
    assert "one of LLaMA-Factory's, TRL's or Axolotl's" in text


def test_a_drawn_part_says_so(config: Path) -> None:
    made = plan(str(config), "--sample", "100")
    assert made["sizes"]["num_sampled"] == 100
    tokens = made["sizes"]["total_tokens"]
    assert tokens["low"] <= plan(str(config))["sizes"]["total_tokens"]["value"] <= tokens["high"]


def test_what_a_run_would_refuse_is_refused(config: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(config), "--set", "tokenization.max_length=20"])
    assert result.exit_code == 1
    assert "refused:" in result.output or "TokenizationError" in result.output
    unknown = CliRunner().invoke(app, ["plan", str(config), "--set", "training.target_modules=[nowhere]"])
    assert unknown.exit_code == 1
    assert "'nowhere'" in unknown.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU holds such weights")
def test_weights_that_only_a_gpu_holds_are_refused_by_the_plan_and_before_a_run_s_first_stage(config: Path) -> None:
    said = "training.base_weights is nf4, which needs a GPU: set it to full"
    result = CliRunner().invoke(app, ["plan", str(config), "--set", "training.base_weights=nf4", "--measure"])
    assert (result.exit_code, f"refused: {said}" in result.stdout) == (1, True)
    with pytest.raises(TrainingError, match=said):
        gpu_stages.prepare(TrainingConfig(base_weights="nf4"))
