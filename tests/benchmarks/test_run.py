"""The benchmark of the whole job runs without a GPU too, so that it still runs on the day it is wanted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.inputs import RowError, read_rows
from tests.benchmarks.sft_run import ROOT

pytestmark = pytest.mark.slow


def test_a_whole_job_ends_with_a_version_and_its_seconds_by_stage(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "name: bench\ntraining: {num_epochs: 1, rank: 4, alpha: 8}\n"
        "evaluation: {max_examples: 8, max_new_tokens: 4, num_resamples: 100}\n"
        "merge: {num_probes: 2, probe_tokens: 4}\n"
    )
    command = [sys.executable, "-m", "tests.benchmarks.run", "--work", str(tmp_path), "--rows", "40", "--runs", "1"]
    done = subprocess.run(
        [*command, "--config", str(config), "--model", str(ROOT / "deploy" / "demo" / "base_model")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["runs"]["ours, run 1"]
    assert (found["version"], found["steps"], found["examples"]) == ("sft-model/1", 2, 32)
    seconds = found["seconds"]
    parts = sum(value for name, value in seconds.items() if name != "whole")
    assert abs(parts - seconds["whole"]) < 0.2
    assert 0 < seconds["train"] < seconds["whole"]


def test_rows_of_unknown_form_are_refused_by_place(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Add.", "input": "1 2", "output": "3"}\n{"text": "once"}\n')
    with pytest.raises(RowError, match=r"rows.jsonl, row 2: has the keys \['text'\]"):
        read_rows([file], None)
