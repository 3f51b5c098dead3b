"""Several ranks optimize the same sum as one: real processes over gloo."""

import os
import random
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from schemas.config import TrainingConfig
from tasks.training.batches import form_batch
from tasks.training.checkpoints import Progress, restore_checkpoint, take_snapshot, write_snapshot
from tasks.training.distributed import (
    check_ranks_agree,
    gather,
    run_on_rank0,
    shard_batches,
    share_table,
    sum_gradients,
)
from tasks.training.loop import train_adapter
from tasks.training.preparation import prepare_training
from tasks.training.process.launch import run_training
from tasks.training.process.messages import TrainingJob
from tasks.training.records import EvalRecord, StepRecord, TrainingCrash, TrainingError, TrainingStopped
from tasks.training.sharding import is_sharded, shard_base
from tasks.training.steps import Run, do_step, iterate
from tests.tasks.training.conftest import read_tokens, write_tokens
from tests.tasks.training.process.test_launch import at_step, find_processes, list_checkpoints
from tests.tasks.training.ranks import on_two_ranks

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
        self.evaluations = evaluations
        self.tokens = [record.num_trained_tokens for record in steps]
        self.adapter = load_file(outcome.adapter / "adapter_model.safetensors")
        self.outcome = outcome


def farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def train_together(
    number: int, base_model: Path, tokens: Path, folder: Path, changes: dict[str, Any]
) -> tuple[list[StepRecord], list[EvalRecord], int]:
    """Train; return both curves, and how many of the base's weights this rank holds."""
    config = CONFIG.model_copy(update=changes)
    steps: list[StepRecord] = []
    evaluations: list[EvalRecord] = []
    setup = prepare_training(base_model, tokens, folder / "examples", config, seed=5)
    if config.engine == "general" and is_sharded(config):
        shard_base(setup.model, setup.device)
    frozen: list[Any] = [parameter for parameter in setup.model.parameters() if not parameter.requires_grad]
    held = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in frozen]
    train_adapter(
        base_model, tokens, folder, config, seed=5, identity="x",
        on_step=steps.append, on_eval=evaluations.append,
    )  # fmt: skip
    return steps, evaluations, sum(parameter.numel() for parameter in held)


GENERAL_FSDP = {"strategy": "fsdp", "engine": "general"}


@pytest.mark.parametrize(
    ("changes", "num_held"),
    # 2 layers of 7680 weights and 80 scales, an embedding of 97 * 32, 32 scales at the end; 97 rows are 49 and 48.
    # The fused engine keeps the layers' shares itself: the model has scales and embedding.
    [({}, [18656, 18656]), (GENERAL_FSDP, [9344, 9312]), ({"strategy": "fsdp"}, [3296, 3296])],
)
def test_two_ranks_have_the_curve_of_one(
    base_model: Path, many_tokens: Path, tmp_path: Path, alone: Curves, changes: dict[str, Any], num_held: list[int]
) -> None:
    told = on_two_ranks(train_together, base_model, many_tokens, tmp_path, changes, folder=tmp_path / "ranks")
    for steps, evaluations, _ in told:
        assert [record.step for record in steps] == list(range(1, NUM_STEPS + 1))
        assert [record.num_trained_tokens for record in steps] == alone.tokens
        assert [record.loss for record in steps] == pytest.approx(alone.losses, abs=1e-5)
        assert [record.grad_norm for record in steps] == pytest.approx(alone.norms, rel=1e-4)
        assert [record.loss for record in evaluations] == pytest.approx(alone.eval_losses, abs=1e-5)
    assert farthest(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), alone.adapter) < 1e-5
    assert [held for _, _, held in told] == num_held


def train_with_dropout(number: int, base_model: Path, tokens: Path, run_folder: Path, stop_at: int) -> list[float]:
    """Train until the second rank wants to stop; return the losses."""
    losses: list[float] = []
    config = CONFIG.model_copy(update={"dropout": 0.1, "engine": "general"})
    with suppress(TrainingStopped):
        train_adapter(
            base_model, tokens, run_folder, config, seed=5, identity="x",
            on_step=lambda record: losses.append(record.loss),
            should_stop=lambda: number == 1 and len(losses) == stop_at,
        )  # fmt: skip
    return losses


def test_two_ranks_with_dropout_go_on_exactly(base_model: Path, many_tokens: Path, tmp_path: Path) -> None:
    def train(name: str, folder: str, stop_at: int) -> list[list[float]]:
        given = (base_model, many_tokens, tmp_path / name, stop_at)
        return on_two_ranks(train_with_dropout, *given, folder=tmp_path / folder)

    whole, _ = train("whole", "a", 1000)
    first, other = train("stopped", "b", 10)
    assert len(whole) == NUM_STEPS
    assert first == other == whole[:10]
    rest, _ = train("stopped", "c", 1000)
    assert rest == whole[10:]
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert farthest(*adapters) == 0.0


def step_with_little_memory(number: int, base_model: Path, tokens: Path, folder: Path) -> tuple[float, list[str], int]:
    """Do one step, for which the second rank's memory is too small while all activations are kept."""
    config = CONFIG.model_copy(update={"engine": "general"})
    run = Run(prepare_training(base_model, tokens, folder, config, seed=5), Progress(), "x")

    def refuse(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        if number == 1 and not module.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run.setup.model.register_forward_pre_hook(refuse, with_kwargs=True)
    record, _ = do_step(run, iterate(run))
    return record.loss, run.warnings, getattr(run.setup.engine, "num_recomputed", 0)


def test_shortage_of_one_rank_makes_all_smaller(
    base_model: Path, many_tokens: Path, tmp_path: Path, alone: Curves
) -> None:
    first, second = on_two_ranks(
        step_with_little_memory, base_model, many_tokens, tmp_path / "examples", folder=tmp_path / "ranks"
    )
    assert first[0] == second[0] == pytest.approx(alone.losses[0], abs=1e-5)
    assert first[2] == second[2] == 2
    assert "(on another rank)" in first[1][0]
    assert "(CUDA out of memory.)" in second[1][0]


def drift_apart(number: int) -> None:
    parameter = nn.Parameter(torch.ones(8))
    check_ranks_agree({"a": parameter}, step=1)
    with torch.no_grad():
        parameter[3] += number * 1e-6
    check_ranks_agree({"a": parameter}, step=2)


def test_ranks_that_drift_apart_are_found(tmp_path: Path) -> None:
    for error in on_two_ranks(drift_apart, folder=tmp_path / "ranks"):
        assert isinstance(error, TrainingError)
        assert "step 2: the adapter of rank 1 is no longer the one of rank 0" in str(error)


def fail_as_leader(number: int) -> list[int]:
    def fail() -> None:
        raise TrainingError(f"from rank {number}")

    assert gather(number) == [0, 1]
    run_on_rank0(fail)
    return []


def draw_around_a_checkpoint(number: int, folder: Path) -> tuple[list[float], list[float]]:
    """Draw what comes after a checkpoint, and once more after it was restored."""
    torch.manual_seed(number)
    random.seed(number)
    parameters = {"a": nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    snapshot = take_snapshot(parameters=parameters, optimizer=optimizer, progress=Progress(1), identity="x")
    if snapshot is not None:
        write_snapshot(snapshot, folder, keep=1)
    gather(None)
    draws = [*torch.rand(3).tolist(), random.random()]
    restore_checkpoint(folder / "step-000001", parameters=parameters, optimizer=optimizer)
    return draws, [*torch.rand(3).tolist(), random.random()]


def test_each_rank_gets_its_own_random_states_back(tmp_path: Path) -> None:
    ranks = on_two_ranks(draw_around_a_checkpoint, tmp_path / "checkpoints", folder=tmp_path / "ranks")
    assert all(draws == again for draws, again in ranks)
    assert ranks[0] != ranks[1]


def test_error_of_the_leader_is_raised_by_all(tmp_path: Path) -> None:
    errors = on_two_ranks(fail_as_leader, folder=tmp_path / "ranks")
    assert [str(error) for error in errors] == ["from rank 0"] * 2


def test_interrupted_processes_leave_a_checkpoint_that_one_goes_on_from(
    base_model: Path, many_tokens: Path, tmp_path: Path, alone: Curves
) -> None:
    config = CONFIG.model_copy(update={"num_processes": 2})
    job = TrainingJob(base_model, many_tokens, tmp_path, config, 5, "x")
    losses: list[float] = []

    def on_step(record: StepRecord) -> None:
        losses.append(record.loss)
        if record.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(job, on_step=on_step)
    assert find_processes(job) == []
    (step,) = list_checkpoints(job)
    assert len(losses) == step
    assert losses == pytest.approx(alone.losses[:step], abs=1e-5)
    rest = Curves(replace(job, config=CONFIG))
    assert rest.outcome.resumed_from_step == step
    assert farthest(rest.adapter, alone.adapter) < 1e-5


def test_death_of_one_rank_ends_all(base_model: Path, many_tokens: Path, tmp_path: Path) -> None:
    """Where there is no checkpoint to go on from, however far the ranks are ahead of what has been told of them."""
    config = CONFIG.model_copy(update={"num_processes": 2, "num_epochs": 1000.0, "checkpoint_every_steps": 1_000_000})
    job = TrainingJob(base_model, many_tokens, tmp_path, config, 5, "x")

    def kill() -> None:
        max(find_processes(job), key=lambda process: process.pid).kill()

    with pytest.raises(TrainingCrash, match=r"process 2 of 2 \(local rank 1\) of the training was killed by SIGKILL"):
        run_training(job, on_step=at_step(3, kill))
    assert find_processes(job) == []


def test_a_lost_rank_is_started_again_from_the_last_checkpoint(
    base_model: Path, many_tokens: Path, alone: "Curves", tmp_path: Path
) -> None:
    """The training goes on by itself, says so, and ends where the undisturbed one does."""
    job = TrainingJob(base_model, many_tokens, tmp_path, CONFIG.model_copy(update={"num_processes": 2}), 5, "x")
    lost: list[int] = []
    said: list[str] = []

    def kill(record: StepRecord) -> None:
        if not lost and list_checkpoints(job):
            lost.append(max(find_processes(job), key=lambda process: process.pid).pid)
            os.kill(lost[0], signal.SIGKILL)

    outcome = run_training(job, on_step=kill, on_log=lambda level, text: said.append(text))
    (warning,) = (text for text in outcome.warnings if "goes on" in text)
    assert warning == "The training was lost and goes on from the checkpoint of step 8"
    assert any(text.startswith(warning + ": process 2 of 2") for text in said)
    assert lost
    assert outcome.resumed_from_step == 8
    assert farthest(load_file(outcome.adapter / "adapter_model.safetensors"), alone.adapter) < 1e-5
    later = run_training(replace(job, config=CONFIG), in_place=True)  # an attempt that finds the last checkpoint
    assert later.resumed_from_step == outcome.num_steps
    assert warning in later.warnings


def test_processes_without_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 processes \(num_processes 2 x num_nodes 2\).*there are 3 \(micro_batch 3"):
        TrainingConfig(num_processes=2, num_nodes=2, micro_batch=3)


def test_alone_everything_is_ones_own(many_tokens: Path) -> None:
    table, _ = read_tokens(many_tokens / "train.parquet")
    batches = [form_batch(table, [[0], [1]]), form_batch(table, [[2]])]
    assert (
        shard_batches(batches, is_even=True)
        == shard_batches(batches, is_even=False)
        == [(batches[0], 1.0), (batches[1], 1.0)]
    )
    ((whole, counts),) = share_table(table)
    assert counts
    assert sorted(whole.example_ids) == sorted(table.example_ids)
    assert np.sort(whole.input_ids).tolist() == np.sort(table.input_ids).tolist()
    parameter = nn.Parameter(torch.ones(2))
    assert sum_gradients([parameter], torch.tensor(3.0)) == [torch.tensor(3.0)]
    assert parameter.grad is None


def test_shares_of_three_ranks_hold_each_example_once(many_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = read_tokens(many_tokens / "eval.parquet")
    batches = [form_batch(table, [[index]]) for index in range(7)]
    counted: list[str] = []
    dealt: list[str] = []
    for number in range(3):
        monkeypatch.setattr("tasks.training.distributed.world_size", lambda: 3)
        monkeypatch.setattr("tasks.training.distributed.rank", lambda number=number: number)
        shares = share_table(table)
        assert [len(share.example_ids) for share, _ in shares] == [2, 1]
        counted += [name for share, counts in shares if counts for name in share.example_ids]
        turns = shard_batches(batches, is_even=True)
        assert len(turns) == 3
        dealt += [batch.example_ids[0] for batch, weight in turns if weight]
        assert shares[0][0].targets.size == int(shares[0][0].lengths.sum())
    assert sorted(counted) == sorted(dealt) == sorted(table.example_ids)
