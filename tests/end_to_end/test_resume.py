"""Killed in the middle of training and started again: the same run goes on and ends with the same adapter."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prefect.settings import PREFECT_API_URL
from safetensors.torch import load_file

from flows.attempts import ResumeError
from schemas.artifacts import AdapterRef
from tasks import tracking
from tests.end_to_end.conftest import BASE_MODEL, ROOT, RunPipeline

pytestmark = pytest.mark.slow
_TIMEOUT_SECONDS = 240


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": tmp_path.name,
        "model": {"base_model": str(BASE_MODEL)},
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "training": {
            "rank": 4,
            "alpha": 8,
            "dropout": 0.1,
            "num_epochs": 12,
            "micro_batch": 4,
            "gradient_accumulation_steps": 2,
            "checkpoint_every_steps": 10,
        },
        "evaluation": {"max_new_tokens": 8, "num_resamples": 100},
        "registry": {"name": "resumed"},
    }


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the commands have it here: another number of threads adds in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", "run", str(config), *arguments]


def _report(environment: dict[str, str], config: Path) -> dict[str, Any]:
    path = config.with_name("report.json")
    command = _command(config, "--report", str(path))
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"Went on from the checkpoint of step \d+$", done.stderr, re.MULTILINE)
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def _kill_after_first_checkpoint(environment: dict[str, str], config: Path) -> str:
    """Start a run, kill it with SIGKILL once a checkpoint exists, and return its MLflow run id."""
    runs = Path(environment["SFT_HOME"]) / "runs"
    before = set(runs.glob("*"))
    with subprocess.Popen(
        _command(config), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            new = [run for run in runs.glob("*") if run not in before]
            if new and any((new[0] / "train" / "checkpoints").glob("step-*")):
                break
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be killed"
        children = psutil.Process(process.pid).children(recursive=True)  # Prefect's temporary server
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == [], "a killed run left its temporary server behind"
    return new[0].name


def _adapter(run_id: str) -> dict[str, Any]:
    ref = tracking.recall(run_id, "train", AdapterRef)
    assert ref is not None
    return load_file(tracking.resolve(ref) / "adapter_model.safetensors")


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_in_the_same_run_and_ends_with_the_same_adapter(
    command_environment: dict[str, str],
    config: dict[str, Any],
    run_pipeline: RunPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    environment = {**command_environment, "OMP_NUM_THREADS": "1"}
    killed = _kill_after_first_checkpoint(environment, path)
    monkeypatch.setenv("SFT_HOME", environment["SFT_HOME"])
    # Other data under the interrupted run is refused, and so is another config.
    rows = tmp_path / "rows.jsonl"
    original = rows.read_text()
    rows.write_text(original.replace("The number 7 ", "The number seven "))
    with pytest.raises(ResumeError, match=f"the dataset changed since run {killed} began"):
        run_pipeline(config)
    rows.write_text(original)
    with pytest.raises(ResumeError, match=r"training\.rank: 4 -> 8"):
        run_pipeline({**config, "training": {**config["training"], "rank": 8}}, resume=killed)
    # The refusals left the run as it was: the plain command finds it by its config, and goes on. The session's Prefect
    # server spares it the start of one of its own.
    resumed = _report({**environment, "PREFECT_API_URL": str(PREFECT_API_URL.value())}, path)
    assert resumed["mlflow_run_id"] == killed
    undisturbed = run_pipeline(config, resume="never")
    assert undisturbed.mlflow_run_id != killed
    one, other = _adapter(killed), _adapter(undisturbed.mlflow_run_id)
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-6
    assert resumed["training"]["steps"] == undisturbed.training.steps
