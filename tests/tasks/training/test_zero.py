"""ZeRO-2 and ZeRO-3 have the curve of one process, and their checkpoints are those of any other strategy."""

import gc
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from schemas.config import TrainingConfig
from tasks.training.loop import train_adapter
from tasks.training.process.launch import run_training
from tasks.training.process.messages import TrainingJob
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingStopped
from tests.tasks.training.conftest import needs_deepspeed, write_tokens
from tests.tasks.training.ranks import on_two_ranks
from tests.tasks.training.test_distributed import CONFIG, Curves, farthest

# Every step is clipped, and decays what is trained. 44 examples: the eighth step has two, one for each rank.
EXACT = CONFIG.model_copy(update={"weight_decay": 0.1, "max_grad_norm": 0.3, "engine": "general", "num_epochs": 1.5})


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def train_part(
    number: int, base_model: Path, tokens: Path, folder: Path, changes: dict[str, Any], stop_at: int
) -> tuple[list[StepRecord], list[EvalRecord], int]:
    """Train until a step, or the end; return both curves, and how many frozen weights this rank held apart."""
    steps: list[StepRecord] = []
    evaluations: list[EvalRecord] = []
    held = 0

    def should_stop() -> bool:
        nonlocal held
        found: list[Any] = [thing for thing in gc.get_objects() if type(thing) is nn.Parameter]
        held = sum(p.ds_tensor.numel() for p in found if hasattr(p, "ds_tensor") and not p.requires_grad)
        return bool(steps) and steps[-1].step == stop_at

    with suppress(TrainingStopped):
        train_adapter(
            base_model, tokens, folder, EXACT.model_copy(update=changes), seed=5, identity="x",
            on_step=steps.append, on_eval=evaluations.append, should_stop=should_stop,
        )  # fmt: skip
    return steps, evaluations, held


@needs_deepspeed
def test_one_process_zero2_and_zero3_go_on_from_each_other_along_one_curve(base_model: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", num_train=44, num_eval=7)
    alone = Curves(TrainingJob(base_model, tokens, tmp_path / "alone", EXACT, 5, "x"))
    assert min(alone.norms) > EXACT.max_grad_norm
    folder = tmp_path / "together"
    train_part(0, base_model, tokens, folder, {}, 3)
    first = 3
    # All 18656 frozen weights are divided by zero3 alone; see test_distributed.
    for strategy, recomputes, last, num_held in (("zero2", False, 7, 0), ("zero3", True, 12, 9328)):
        changes = {"strategy": strategy, "gradient_checkpointing": recomputes}
        given = (base_model, tokens, folder, changes, last)
        told = on_two_ranks(train_part, *given, folder=tmp_path / strategy, library="deepspeed")
        for steps, evaluations, held in told:
            assert held == num_held
            assert [record.step for record in steps] == list(range(first + 1, last + 1))
            assert [record.loss for record in steps] == pytest.approx(alone.losses[first:last], abs=1e-5)
            assert [record.grad_norm for record in steps] == pytest.approx(alone.norms[first:last], rel=1e-4)
            expected = [record.loss for record in alone.evaluations if first < record.step <= last]
            assert [record.loss for record in evaluations] == pytest.approx(expected, abs=1e-5)
        first = last
    assert farthest(load_file(folder / "adapter" / "adapter_model.safetensors"), alone.adapter) < 1e-5


def test_without_deepspeed_no_process_starts(
    base_model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what an import that fails leaves
    job = TrainingJob(base_model, tokens, tmp_path / "run", EXACT, 5, "x")
    spread = EXACT.model_copy(update={"num_processes": 2, "strategy": "zero3"})
    with pytest.raises(TrainingError, match=r"strategy is zero3.*pip install 'sft-pipeline\[deepspeed\]'"):
        run_training(replace(job, config=spread))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize(("changes", "message"), [
    ({"base_weights": "nf4"}, "base_weights is nf4 and strategy is"),
    ({"base_weights": "fp8"}, "base_weights is fp8 and strategy is"),
    ({"engine": "fused"}, "engine is fused and strategy is"),
])  # fmt: skip
def test_what_cannot_be_divided_is_refused(strategy: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(num_processes=2, strategy=strategy, **changes)
    assert TrainingConfig(strategy=strategy, **changes).strategy == strategy  # one process divides nothing


def test_what_fsdp_divides_is_told_by_the_config() -> None:
    with pytest.raises(ValueError, match="base_weights is nf4 and strategy is fsdp"):
        TrainingConfig(num_processes=2, strategy="fsdp", base_weights="nf4")
    with pytest.raises(ValueError, match=r"engine is fused and strategy is fsdp.*weights of the model itself"):
        TrainingConfig(num_processes=2, strategy="fsdp", engine="fused", method="full")
    assert TrainingConfig(num_processes=2, strategy="fsdp", engine="fused", base_weights="fp8").engine == "fused"
