"""The batch files of Slurm, run by bash, with srun and scontrol in the place of its own: who starts what, and when."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end.service import ROOT

FOLDER = ROOT / "deploy" / "slurm"
# Slurm's srun starts a task on each node and passes signals on.
SRUN = """#!/bin/bash
echo "srun $*" >> "$SAID"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\nnode9\\n'; else echo "scontrol $*" >> "$SAID"; fi
"""
# A run that ends when it is told to, with the code of a process that was cut short.
SFT = """#!/bin/bash
trap 'echo "sft $1 told to stop in $SFT_STOP_SECONDS s" >> "$SAID"; exit 143' TERM
echo "sft $* at $SFT_RENDEZVOUS sharing $SFT_TEAM" >> "$SAID"
if [ "$HOW" = ends ] || [ "$1 $HOW" = "join lost" ]; then sleep 0.2; exit "${CODE:-0}"; fi
for _ in $(seq 300); do sleep 0.1; done
"""


class Batch:
    """A batch file under way."""

    def __init__(self, name: str, folder: Path, *arguments: str, **variables: str) -> None:
        self._said = folder / "said"
        for program, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sft", SFT)):
            (folder / program).write_text(text)
            (folder / program).chmod(0o755)
        known = {"PATH": f"{folder}:{os.environ['PATH']}", "SAID": str(self._said), "SFT_COMMAND": str(folder / "sft")}
        slurm = {"SLURM_JOB_ID": "12", "SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "node[7-9]", "SFT_TEAM": "s3://b/t"}
        self.process = subprocess.Popen(["bash", FOLDER / name, *arguments], env={**known, **slurm, **variables})

    def said(self) -> list[str]:
        return sorted(self._said.read_text().splitlines()) if self._said.exists() else []

    def wait_for(self, start: str, count: int = 1) -> None:
        deadline = time.monotonic() + 60
        while sum(line.startswith(start) for line in self.said()) < count:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)


def read_options(name: str) -> dict[str, str]:
    lines = (FOLDER / name).read_text().splitlines()
    return dict([*line.split(" --")[1].split("=", 1), ""][:2] for line in lines if line.startswith("#SBATCH"))


def test_the_first_node_runs_and_the_others_join(tmp_path: Path) -> None:
    batch = Batch("team.sbatch", tmp_path, "my.yaml", HOW="ends")
    assert batch.process.wait(timeout=60) == 0
    sft = tmp_path / "sft"
    assert batch.said() == [
        "sft join at node7:29400 sharing s3://b/t",
        "sft run my.yaml at node7:29400 sharing s3://b/t",
        f"srun --relative=0 --nodes=1 --ntasks=1 {sft} run my.yaml",
        f"srun --relative=1 --nodes=2 --ntasks=2 --kill-on-bad-exit=0 {sft} join",
    ]
    options = read_options("team.sbatch")
    assert options["signal"] == "B:TERM@120"
    assert {"requeue", "no-kill"} <= set(options)


def test_a_notice_is_passed_on_and_the_job_is_queued_again(tmp_path: Path) -> None:
    batch = Batch("team.sbatch", tmp_path, "my.yaml", HOW="trains")
    batch.wait_for("sft ", 2)
    batch.process.send_signal(signal.SIGTERM)
    assert batch.process.wait(timeout=60) == 143
    told = [line for line in batch.said() if not line.startswith("srun") and " at " not in line]
    assert told == ["scontrol requeue 12", "sft join told to stop in 100 s", "sft run told to stop in 100 s"]


@pytest.mark.parametrize(("how", "code"), [("ends", 1), ("ends", 0)])
def test_a_run_that_ends_by_itself_is_not_queued_again(tmp_path: Path, how: str, code: int) -> None:
    batch = Batch("team.sbatch", tmp_path, "my.yaml", HOW=how, CODE=str(code))
    assert batch.process.wait(timeout=60) == code
    assert not [line for line in batch.said() if line.startswith("scontrol")]


def test_a_lost_guest_ends_nothing(tmp_path: Path) -> None:
    batch = Batch("team.sbatch", tmp_path, "my.yaml", HOW="lost", CODE="137")
    batch.wait_for("sft ", 2)
    time.sleep(0.5)  # the guest has ended by then
    assert batch.process.poll() is None
    batch.process.send_signal(signal.SIGTERM)
    assert batch.process.wait(timeout=60) == 143


def test_a_machine_of_an_array_is_queued_again_alone(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2", "SFT_RENDEZVOUS": "unused"}
    batch = Batch("machine.sbatch", tmp_path, HOW="trains", **array)
    batch.wait_for("sft join")
    batch.process.send_signal(signal.SIGTERM)
    assert batch.process.wait(timeout=60) == 143
    assert "scontrol requeue 40_2" in batch.said()


@pytest.mark.parametrize(("name", "arguments"), [("team.sbatch", ["my.yaml"]), ("machine.sbatch", [])])
def test_a_place_is_wanted(tmp_path: Path, name: str, arguments: list[str]) -> None:
    batch = Batch(name, tmp_path, *arguments, HOW="ends", SFT_TEAM="")
    assert batch.process.wait(timeout=60) != 0
    assert not [line for line in batch.said() if line.startswith("sft")]
