"""Objectives as functions of log-probabilities, in both engines, against plain PyTorch on one example at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from schemas.config import TrainingConfig
from tasks.training.batches import form_batch
from tasks.training.engines.loss import compute_token_losses
from tasks.training.loop import train_adapter
from tasks.training.objective import SFT, Objective
from tasks.training.optimization import descend
from tasks.training.optimizers import WholeOptimizer
from tasks.training.preparation import Setup, prepare_training
from tasks.training.records import StepRecord, TrainingError
from tests.tasks.training.conftest import write_tokens
from tests.tasks.training.families import build_family

ENGINES = ("fused", "general", "padded")
# From outside the package: dynamic fine-tuning (Wu et al., 2025) weighs a token by the probability that it has already.
DFT = Objective("dynamic fine-tuning", lambda log_probs, batch: -(log_probs.detach().exp() * log_probs).sum())


def weigh(tokens: Path, value: Callable[[int, int], float]) -> Path:
    """Give each label of train.parquet a weight by the numbers of its example and position."""
    table = pl.read_parquet(tokens / "train.parquet")
    lengths = table["input_ids"].list.len()
    weights = [[value(row, place) for place in range(length)] for row, length in enumerate(lengths)]
    table.with_columns(pl.Series("weights", weights, dtype=pl.List(pl.Float32))).write_parquet(tokens / "train.parquet")
    return tokens


def prepare(tmp_path: Path, tokens: Path, engine: str, objective: Objective, **training: Any) -> Setup:
    base_model = build_family(tmp_path / "model", "gemma2" if engine == "padded" else "llama")
    choice: Any = "general" if engine == "padded" else engine
    config = TrainingConfig(rank=4, alpha=8, micro_batch=4, max_grad_norm=1e9, engine=choice, **training)
    setup = prepare_training(base_model, tokens, tmp_path / "examples", config, seed=3, objective=objective)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in setup.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return setup


def take_gradient(setup: Setup, rows: int = 8) -> tuple[float, Tensor]:
    """Do a step of the first rows with plain gradient descent at rate 1; return its loss and gradient."""
    before = {name: parameter.detach().clone() for name, parameter in setup.parameters.items()}
    assert isinstance(setup.optimizer, WholeOptimizer)
    optimizer = replace(setup.optimizer, optimizer=torch.optim.SGD(list(setup.parameters.values()), fused=True))
    batches = setup.engine.form_step(setup.table, setup.rows[:rows])
    loss, *_ = descend(replace(setup, optimizer=optimizer), batches, 1.0, step=1)
    return loss, torch.cat([(before[name] - parameter).flatten() for name, parameter in setup.parameters.items()])


def compute_plainly(setup: Setup, weigh_losses: Callable[[Tensor, int], tuple[Tensor, float]]) -> tuple[float, Tensor]:
    """Return loss and gradient by one example at a time through the model's own forward pass."""
    sums, sizes = [], []
    base: Any = setup.model.get_base_model()
    chosen = base.config._attn_implementation
    base.set_attn_implementation("eager")
    for index in range(8):
        losses = compute_token_losses(setup.model, form_batch(setup.table, [[index]]))
        total, size = weigh_losses(losses, index)
        sums.append(total)
        sizes.append(size)
    base.set_attn_implementation(chosen)
    loss = torch.stack(sums).sum() / sum(sizes)
    grads = torch.autograd.grad(loss, list(setup.parameters.values()))
    return float(loss.item()), torch.cat([grad.flatten() for grad in grads])


def assert_same(found: tuple[float, Tensor], wanted: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert float((found[1] - wanted[1]).norm() / wanted[1].norm()) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_an_objective_is_one_object_from_outside(tmp_path: Path, engine: str) -> None:
    tokens = write_tokens(tmp_path / "tokens", num_train=8, num_eval=1)
    setup = prepare(tmp_path, tokens, engine, DFT)
    wanted = compute_plainly(
        setup, lambda losses, index: (((-losses).exp().detach() * losses).sum(), float(len(losses)))
    )
    plain = compute_plainly(setup, lambda losses, index: (losses.sum(), float(len(losses))))
    assert abs(plain[0] - wanted[0]) > 0.1
    assert_same(take_gradient(setup), wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_weigh_what_their_rows_say(tmp_path: Path, engine: str) -> None:
    def value(row: int, place: int) -> float:
        return (0.25, 1.0, 0.0, 0.5)[(row + place) % 4]

    tokens = weigh(write_tokens(tmp_path / "tokens", num_train=8, num_eval=1), value)
    setup = prepare(tmp_path, tokens, engine, SFT)

    def weigh_losses(losses: Tensor, index: int) -> tuple[Tensor, float]:
        start, end = setup.table.offsets[index], setup.table.offsets[index + 1]
        # A position predicts the token behind it.
        trained = [place for place in range(end - start) if setup.table.targets[start + place] >= 0]
        weights = torch.tensor([value(index, place + 1) for place in trained])
        return (weights * losses).sum(), float(weights.sum())

    wanted = compute_plainly(setup, weigh_losses)
    assert_same(take_gradient(setup), wanted)


def test_weight_0_is_as_not_trained_and_1_as_no_weight(tmp_path: Path) -> None:
    plain = write_tokens(tmp_path / "plain", num_train=8, num_eval=1)
    wanted = take_gradient(prepare(tmp_path / "a", plain, "general", SFT))
    ones = weigh(write_tokens(tmp_path / "ones", num_train=8, num_eval=1), lambda row, place: 1.0)
    assert_same(take_gradient(prepare(tmp_path / "b", ones, "general", SFT)), wanted)

    halves = weigh(write_tokens(tmp_path / "halves", num_train=8, num_eval=1), lambda row, place: float(row < 4))
    setup = prepare(tmp_path / "c", halves, "general", SFT)
    first = setup.engine.form_step(setup.table, setup.rows[:4])
    assert_same(take_gradient(setup), take_gradient(prepare(tmp_path / "d", plain, "general", SFT), 4))
    assert sum(batch.total_weight for batch in first) == sum(batch.num_trained_tokens for batch in first)


def test_step_that_weighs_nothing_is_an_error(tmp_path: Path) -> None:
    tokens = weigh(write_tokens(tmp_path / "tokens", num_train=4, num_eval=1), lambda row, place: 0.0)
    setup = prepare(tmp_path, tokens, "general", SFT)
    with pytest.raises(TrainingError, match=r"step 1: all trained tokens of examples train-.* weigh 0: remove them"):
        descend(setup, setup.engine.form_step(setup.table, setup.rows[:4]), 1e-3, step=1)


def test_packs_carry_their_weights(tmp_path: Path) -> None:
    tokens = weigh(write_tokens(tmp_path / "tokens", num_train=8, num_eval=1), lambda row, place: 0.125 * row)
    setup = prepare(tmp_path, tokens, "general", SFT, packing=True, tokens_per_pack=64)
    table = setup.table
    assert table.weights is not None
    for row in range(8):
        weights = table.weights[table.offsets[row] : table.offsets[row + 1]]
        assert np.array_equal(weights[:-1], np.full(len(weights) - 1, 0.125 * row, np.float32))
        assert weights[-1] == 0
    batches = setup.engine.form_step(table, setup.rows)
    total = sum(batch.total_weight for batch in batches)
    assert total == pytest.approx(float((table.weights * (table.targets >= 0)).sum()))


def test_whole_training_by_another_objective(tmp_path: Path) -> None:
    base_model = build_family(tmp_path / "model", "llama")
    tokens = write_tokens(tmp_path / "tokens", num_train=16, num_eval=2)
    config = TrainingConfig(rank=4, alpha=8, learning_rate=1e-2, max_steps=8, num_epochs=20)
    curves = []
    for objective in (SFT, DFT):
        records: list[StepRecord] = []
        train_adapter(
            base_model, tokens, tmp_path / objective.name, config, seed=0, identity="x", objective=objective,
            on_step=records.append,
        )  # fmt: skip
        curves.append([record.loss for record in records])
    assert curves[1][0] < 0.5 * curves[0][0]  # p * -log p is at most 1 / e
    assert curves[0][-1] < curves[0][0]
