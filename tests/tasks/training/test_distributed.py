"""Several ranks optimize the same sum as one: real processes over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from schemas.config import TrainingConfig
from tasks.training.batches import form_batch, read_tokens
from tasks.training.distributed import deal, share_table, sum_gradients
from tasks.training.launcher import run_training
from tasks.training.messages import TrainingJob, write_job
from tasks.training.records import EvalRecord, StepRecord, TrainingCrash, TrainingError
from tests.tasks.training.conftest import write_tokens
from tests.tasks.training.test_launcher import at_step, find_processes

# 44 examples in steps of 6: the last step of an epoch has 2, which is one micro batch, and none for the second rank.
CONFIG = TrainingConfig(
    rank=4, alpha=8, learning_rate=1e-2, micro_batch=3, gradient_accumulation_steps=2, num_epochs=3,
    checkpoint_every_steps=8, eval_every_steps=6, precision="fp32",
)  # fmt: skip
NUM_STEPS = 24


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def many_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 7 held-out examples: 3 a rank, and one left over.
    return write_tokens(tmp_path_factory.mktemp("many"), num_train=44, num_eval=7)


@pytest.fixture(scope="module")
def alone(base_model: Path, many_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> "Curves":
    torch.set_num_threads(1)
    return Curves(TrainingJob(base_model, many_tokens, tmp_path_factory.mktemp("alone"), CONFIG, 5, "x"))


class Curves:
    """A training's curves and adapter."""

    def __init__(self, job: TrainingJob) -> None:
        steps: list[StepRecord] = []
        evaluations: list[EvalRecord] = []
        outcome = run_training(job, on_step=steps.append, on_eval=evaluations.append)
        self.steps = [record.step for record in steps]
        self.losses = [record.loss for record in steps]
        self.norms = [record.grad_norm for record in steps]
        self.eval_losses = [record.loss for record in evaluations]
        self.tokens = [record.num_trained_tokens for record in steps]
        self.adapter = load_file(outcome.adapter / "adapter_model.safetensors")
        self.outcome = outcome


def farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_have_the_curve_of_one(
    base_model: Path, many_tokens: Path, tmp_path: Path, alone: Curves, strategy: str
) -> None:
    config = CONFIG.model_copy(update={"num_processes": 2, "strategy": strategy})
    job = TrainingJob(base_model, many_tokens, tmp_path, config, 5, "x")
    both = Curves(job)
    assert both.steps == list(range(1, NUM_STEPS + 1))
    assert both.tokens == alone.tokens
    assert both.losses == pytest.approx(alone.losses, abs=1e-5)
    assert both.norms == pytest.approx(alone.norms, rel=1e-4)
    assert both.eval_losses == pytest.approx(alone.eval_losses, abs=1e-5)
    assert farthest(both.adapter, alone.adapter) < 1e-5
    assert find_processes(job) == []


def test_two_machines_meet_at_an_address(base_model: Path, many_tokens: Path, tmp_path: Path, alone: Curves) -> None:
    config = CONFIG.model_copy(update={"num_nodes": 2})
    job = TrainingJob(base_model, many_tokens, tmp_path, config, 5, "x")
    path = tmp_path / "given.json"
    write_job(job, path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "tasks.training.launcher", str(path)]
    launchers = [
        subprocess.Popen(
            command,
            env={**os.environ, "SFT_RENDEZVOUS": address, "SFT_NODE_RANK": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [launcher.communicate(timeout=120)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    assert f"Trained {NUM_STEPS} steps" in told[0]
    assert farthest(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), alone.adapter) < 1e-5


def test_death_of_one_rank_ends_all(base_model: Path, many_tokens: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"num_processes": 2, "num_epochs": 1000.0})
    job = TrainingJob(base_model, many_tokens, tmp_path, config, 5, "x")

    def kill() -> None:
        max(find_processes(job), key=lambda process: process.pid).kill()

    with pytest.raises(TrainingCrash):
        run_training(job, on_step=at_step(3, kill))
    assert find_processes(job) == []


def test_several_machines_need_an_address(base_model: Path, many_tokens: Path, tmp_path: Path) -> None:
    job = TrainingJob(base_model, many_tokens, tmp_path, CONFIG.model_copy(update={"num_nodes": 2}), 5, "x")
    with pytest.raises(TrainingError, match="SFT_RENDEZVOUS is not set"):
        run_training(job)


def test_alone_everything_is_ones_own(many_tokens: Path) -> None:
    table = read_tokens(many_tokens / "train.parquet")
    batches = [form_batch(table, [[0], [1]]), form_batch(table, [[2]])]
    assert deal(batches, is_even=True) == deal(batches, is_even=False) == [(batches[0], 1.0), (batches[1], 1.0)]
    ((whole, counts),) = share_table(table)
    assert counts
    assert sorted(whole.example_ids) == sorted(table.example_ids)
    assert np.sort(whole.input_ids).tolist() == np.sort(table.input_ids).tolist()
    parameter = nn.Parameter(torch.ones(2))
    assert sum_gradients([parameter], torch.tensor(3.0)) == [torch.tensor(3.0)]
    assert parameter.grad is None


def test_shares_of_three_ranks_hold_each_example_once(many_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_tokens(many_tokens / "eval.parquet")
    batches = [form_batch(table, [[index]]) for index in range(7)]
    counted: list[str] = []
    dealt: list[str] = []
    for number in range(3):
        monkeypatch.setattr("tasks.training.distributed.world_size", lambda: 3)
        monkeypatch.setattr("tasks.training.distributed.rank", lambda number=number: number)
        shares = share_table(table)
        assert [len(share.example_ids) for share, _ in shares] == [2, 1]
        counted += [name for share, counts in shares if counts for name in share.example_ids]
        turns = deal(batches, is_even=True)
        assert len(turns) == 3
        dealt += [batch.example_ids[0] for batch, weight in turns if weight]
        assert shares[0][0].targets.size == int(shares[0][0].lengths.sum())
    assert sorted(counted) == sorted(dealt) == sorted(table.example_ids)
