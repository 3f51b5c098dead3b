"""A documented LoRA config of LLaMA-Factory's goes through `sft run` as it is, to a registered version."""

import json
import shlex
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from tests.end_to_end.conftest import BASE_MODEL, ROOT
from tests.end_to_end.warm import WarmProcess
from tests.schemas.test_llamafactory import TRAIN

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("run_pipeline")
def test_documented_training_runs_as_it_is(tmp_path: Path, command_environment: dict[str, str]) -> None:
    (tmp_path / "data").mkdir()
    index = {
        "identity": {"file_name": "identity.json"},
        "talk": {
            "file_name": "talk.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
    }
    rows = [{"instruction": f"Name number {n}.", "input": "", "output": f"It is {n}."} for n in range(40)]
    talk = [
        {"messages": [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": f"{n + 1}."}]}
        for n in range(20)
    ]
    for name, value in (("dataset_info", index), ("identity", rows), ("talk", talk)):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "my_sft.yaml").write_text(TRAIN)
    overrides = [f"model_name_or_path={BASE_MODEL}", "dataset=identity,talk", "max_samples=30", "num_train_epochs=1"]
    options = ["--report", "report.json", "--output", "merged", "--full-answers"]
    command = [sys.executable, "-m", "flows.cli", "run", "my_sft.yaml", *overrides, *options]
    # The session's Prefect server spares the command the start of one of its own.
    server = {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
    environment = {**command_environment, **server, "PYTHONPATH": str(ROOT), "NPROC_PER_NODE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    # 30 of the 40 rows, and all 20 of the other: a tenth of each is held out.
    assert report["dataset"]["rows_in"] == 50
    assert (report["dataset"]["rows_train"], report["dataset"]["rows_eval"]) == (45, 5)
    assert report["training"]["steps"] == 6  # 45 rows in steps of 1 x 8
    assert report["registry"]["name"] == "model-4b-lora-sft"
    assert "settings translated" in result.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    with closing(WarmProcess(tmp_path, environment)) as warm:
        again = warm.run(shlex.join(["sft", *command[3:]]), typed_in="", seconds=300)
        assert again.returncode == 1
        assert "--output merged: is there already" in again.stderr
        _do_what_follows(warm, tmp_path)


def _do_what_follows(warm: WarmProcess, folder: Path) -> None:
    """Merge and chat by its next two files, which name the output_dir, where LLaMA-Factory had left the adapter."""
    keys = f"model_name_or_path: {BASE_MODEL}\nadapter_name_or_path: saves/model-4b/lora/sft\ntemplate: qwen3_nothink\n"
    (folder / "merge_lora.yaml").write_text(keys + "export_dir: exported\n")
    (folder / "inference.yaml").write_text(keys + "do_sample: false\nmax_new_tokens: 8\n")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return warm.run(shlex.join(["sft", *words]), typed_in="", seconds=300)

    exported = call("run", "merge_lora.yaml")
    assert exported.returncode == 0, exported.stderr[-2000:]
    assert "saves/model-4b/lora/sft is what model-4b-lora-sft/1 was trained as" in exported.stderr
    weights = [folder / name / "model.safetensors" for name in ("exported", "merged")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    answers = [
        call("chat", target, "--prompt", "Name number 3.", "--max-tokens", "8")
        for target in ("inference.yaml", "merged")
    ]
    assert [answer.returncode for answer in answers] == [0, 0], answers[0].stderr[-2000:]
    assert answers[0].stdout == answers[1].stdout
