"""Trainings on GPUs: memory comes back, checkpoints do not hold them up, and two have the curve of one."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tasks.training.checkpoints import Progress, Snapshot, take_snapshot, write_snapshot
from tasks.training.process.launch import run_training
from tasks.training.records import TrainingError
from tests.tasks.training.conftest import build_model, needs_deepspeed
from tests.tasks.training.process.test_launch import CONFIG, Told, at_step, interrupt, list_checkpoints, make_job

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0])


@pytest.mark.gpu
@needs_gpu
def test_gpu_memory_is_given_back_after_any_end(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    before = free_bytes()
    told = Told(make_job(base_model, tokens, tmp_path / "whole"))
    assert (tmp_path / "whole" / "process.log").exists(), "on a GPU the training has its own process"
    assert free_bytes() > before - (64 << 20)
    assert all(record.memory_bytes > 0 for record in told.steps)
    assert all(record.utilisation is not None and 0 <= record.utilisation <= 1 for record in told.steps)
    assert all(record.share_of_peak is not None and 0 < record.share_of_peak < 1 for record in told.steps)
    job = make_job(base_model, tokens, tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        run_training(job, on_step=at_step(3, interrupt))
    assert free_bytes() > before - (64 << 20)
    assert len(list_checkpoints(job)) == 1


@pytest.mark.gpu
@needs_gpu
def test_gpu_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    # As much as rank 64 on all linear layers of a 7B model: 161 M parameters, 1.9 GB with AdamW's moments.
    parameters = {f"p{i}": nn.Parameter(torch.randn(23_000_000, device="cuda")) for i in range(7)}
    optimizer = torch.optim.AdamW(list(parameters.values()), fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = parameters["p0"].detach().clone()

    def take() -> Snapshot:
        taken = take_snapshot(parameters=parameters, optimizer=optimizer, progress=Progress(step=1), identity="x")
        assert taken is not None
        return taken

    take()  # allocates the pinned memory
    torch.cuda.synchronize()
    started = time.perf_counter()
    taken = take()
    asked = time.perf_counter() - started
    with torch.no_grad():
        parameters["p0"].zero_()  # queued behind the copies
    torch.cuda.synchronize()
    copied = time.perf_counter() - started
    assert asked < 0.1
    assert copied < 0.5
    path = write_snapshot(taken, tmp_path, keep=1)
    assert torch.equal(load_file(path / "trained.safetensors")["p0"], kept.cpu())


by_every_strategy = pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)


@pytest.mark.gpu
@needs_two_gpus
@by_every_strategy
def test_two_gpus_have_the_curve_of_one(base_model: Path, tokens: Path, tmp_path: Path, strategy: str) -> None:
    exact = CONFIG.model_copy(update={"dropout": 0.0, "precision": "fp32"})
    one = Told(replace(make_job(base_model, tokens, tmp_path / "one"), config=exact))
    spread = exact.model_copy(update={"num_processes": 2, "strategy": strategy})
    two = Told(replace(make_job(base_model, tokens, tmp_path / "two"), config=spread))
    assert [record.loss for record in two.steps] == pytest.approx([record.loss for record in one.steps], abs=1e-3)
    assert [r.loss for r in two.evaluations] == pytest.approx([r.loss for r in one.evaluations], abs=1e-3)


@pytest.mark.gpu
@needs_two_gpus
@by_every_strategy
def test_two_gpus_have_the_curve_of_one_within_bf16_noise(
    base_model: Path, tokens: Path, tmp_path: Path, strategy: str
) -> None:
    rounded = CONFIG.model_copy(update={"dropout": 0.0, "precision": "bf16", "engine": "general", "num_epochs": 3})
    one = Told(replace(make_job(base_model, tokens, tmp_path / "one"), config=rounded))
    spread = rounded.model_copy(update={"num_processes": 2, "strategy": strategy})
    two = Told(replace(make_job(base_model, tokens, tmp_path / "two"), config=spread))
    # A gradient that is twice too large would leave AdamW's curve as it is, and no norm.
    assert [record.grad_norm for record in two.steps] == pytest.approx([r.grad_norm for r in one.steps], rel=0.1)
    assert [record.loss for record in two.steps] == pytest.approx([record.loss for record in one.steps], abs=0.02)
    assert [r.loss for r in two.evaluations] == pytest.approx([r.loss for r in one.evaluations], abs=0.02)


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("changes", [{}, {"base_weights": "fp8"}, {"dropout": 0.2}, {"gradient_checkpointing": True}])
def test_divided_weights_have_the_curve_of_whole_ones(tokens: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """On two GPUs both ways, with the same batches: what differs is the order of sums on a GPU alone."""
    model = build_model(tmp_path / "model", "llama", num_hidden_layers=5, hidden_size=64, intermediate_size=96)
    config = CONFIG.model_copy(update={"dropout": 0.0, "precision": "bf16", "num_processes": 2, **changes})
    job = make_job(model, tokens, tmp_path / "whole")
    whole = Told(replace(job, config=config))
    given = replace(
        make_job(model, tokens, tmp_path / "divided"), config=config.model_copy(update={"strategy": "fsdp"})
    )
    divided = Told(given)
    assert divided.outcome.engine.startswith("fused")
    assert "frozen layers divided among 2 ranks" in divided.outcome.engine
    assert [r.grad_norm for r in divided.steps] == pytest.approx([r.grad_norm for r in whole.steps], rel=0.05)
    assert [record.loss for record in divided.steps] == pytest.approx([record.loss for record in whole.steps], abs=5e-3)
    assert [r.loss for r in divided.evaluations] == pytest.approx([r.loss for r in whole.evaluations], abs=5e-3)


@pytest.mark.gpu
@needs_gpu
def test_more_processes_than_gpus_are_refused(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    number = torch.cuda.device_count() + 1
    config = CONFIG.model_copy(update={"num_processes": number, "gradient_accumulation_steps": number})
    with pytest.raises(TrainingError, match=r"is over the \d+ GPU"):
        run_training(replace(make_job(base_model, tokens, tmp_path), config=config))
