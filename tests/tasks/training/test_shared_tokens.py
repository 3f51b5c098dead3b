"""Ranks that share each example's tokens train as one process does: real processes over gloo."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from schemas.config import TrainingConfig
from tasks.decoder.across import can_divide
from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.batches import FLAT_MULTIPLE, form_flat_batch
from tasks.training.loop import train_adapter
from tasks.training.records import TrainingError
from tasks.training.slices import take_slice
from tests.tasks.decoder.small_models import draw_table
from tests.tasks.training.conftest import write_tokens
from tests.tasks.training.families import build_family
from tests.tasks.training.ranks import on_two_ranks

CONFIG = TrainingConfig(
    rank=4, alpha=8, learning_rate=1e-2, micro_batch=3, num_epochs=2, eval_every_steps=3, precision="fp32",
    engine="fused", num_processes=2, context_parallel=2,
)  # fmt: skip


def train(number: int, base_model: Path, tokens: Path, folder: Path, config: TrainingConfig) -> dict[str, Any]:
    steps: list[Any] = []
    evaluations: list[Any] = []
    outcome = train_adapter(
        base_model, tokens, folder, config, seed=3, identity="x", on_step=steps.append,
        on_eval=evaluations.append,
    )  # fmt: skip
    return {
        "losses": [record.loss for record in steps],
        "norms": [record.grad_norm for record in steps],
        "tokens": [record.num_trained_tokens for record in steps],
        "held_out": [record.loss for record in evaluations],
        "engine": outcome.engine,
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "mixtral", "gpt_oss"])
def test_the_curve_is_that_of_one_process(tmp_path: Path, family: str) -> None:
    base_model = build_family(tmp_path / "model", family)
    tokens = write_tokens(tmp_path / "tokens", num_train=13, num_eval=5)
    alone = train(0, base_model, tokens, tmp_path / "alone", CONFIG.model_copy(update={"num_processes": 1}))
    for found in on_two_ranks(train, base_model, tokens, tmp_path / "both", CONFIG, folder=tmp_path / "ranks"):
        if isinstance(found, Exception):
            raise found
        assert "2 ranks share its tokens" in found["engine"]
        assert found["tokens"] == alone["tokens"]
        for name in ("losses", "norms", "held_out"):
            assert found[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_slices_hold_every_token_and_every_target_once(size: int) -> None:
    table = draw_table((17, 100, 3, 250))
    table = replace(table, weights=torch.rand(len(table.input_ids)).numpy())
    batch = form_flat_batch(table, range(4))
    slices = [take_slice(batch, number, size) for number in range(size)]
    assert len({part.dropout_key for part in slices}) == size  # a row's mask goes by its number in its slice
    whole = batch.input_ids.shape[1]
    assert torch.equal(torch.cat([each.input_ids for each in slices], 1)[:, :whole], batch.input_ids)
    assert torch.equal(torch.cat([each.targets for each in slices], 1)[:, :whole], batch.targets)
    positions = [each.position_ids for each in slices if each.position_ids is not None]
    assert batch.position_ids is not None
    assert torch.equal(torch.cat(positions, 1)[:, :whole], batch.position_ids)
    assert sum(each.num_tokens for each in slices) == batch.num_tokens
    assert sum(each.num_trained_tokens for each in slices) == batch.num_trained_tokens
    assert sum(each.total_weight for each in slices) == pytest.approx(batch.total_weight)
    for each in slices:
        assert each.input_ids.shape[1] % FLAT_MULTIPLE == 0
        assert each.segments is not None
        assert sum(each.segments.lengths) == size * each.input_ids.shape[1] == int(each.segments.borders[-1])
        assert each.trained is not None
        assert len(each.trained.unique()) == len(each.trained) > 0
        found = each.targets[0].index_select(0, each.trained)
        assert int((found != IGNORE_INDEX).sum()) == each.num_trained_tokens


def test_heads_that_ranks_can_take() -> None:
    assert can_divide(32, 8, 8)
    assert can_divide(32, 4, 8)  # keys repeated
    assert not can_divide(14, 2, 4)
    assert not can_divide(24, 6, 4)


def test_what_cannot_be_shared_says_so(tmp_path: Path) -> None:
    base_model = build_family(tmp_path / "model", "qwen3_5_text")
    tokens = write_tokens(tmp_path / "tokens", num_train=4)
    for error in on_two_ranks(train, base_model, tokens, tmp_path / "both", CONFIG, folder=tmp_path / "ranks"):
        assert isinstance(error, TrainingError)
        assert "gated DeltaNets" in str(error)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_processes": 3}, "a multiple of 2"),
        ({"num_processes": "auto"}, "a multiple of 2"),
        ({"dropout": 0.1}, "dropout 0.0, and dropout is 0.1"),
        ({"strategy": "fsdp"}, "strategy ddp"),
        ({"objective": "dpo"}, "objective sft"),
        ({"engine": "general"}, "engine auto"),
        ({"method": "full"}, "method lora"),
    ],
)
def test_settings_that_do_not_go_with_it(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainingConfig(**{"micro_batch": 4, "num_processes": 2, "context_parallel": 2, **changes})
