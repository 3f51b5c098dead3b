"""Adapters side by side on one frozen model have the losses and gradients that each has alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.config import TrainingConfig
from tasks.training.engines.side_by_side import UnknownDecoderError, build_lanes
from tasks.training.lora import attach_further, collect_trained, list_adapters
from tasks.training.preparation import prepare_training
from tests.tasks.training.conftest import write_tokens
from tests.tasks.training.families import build_family

RANKS = {"default": 4, "b": 2, "c": 8}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("is_bound", [False, True])
def test_each_lane_has_the_gradient_that_it_has_alone(tmp_path: Path, family: str, is_bound: bool) -> None:
    base_model, tokens = build_family(tmp_path / "model", family), write_tokens(tmp_path / "tokens", num_train=9)
    config = TrainingConfig(rank=4, alpha=8, engine="fused")
    setup = prepare_training(base_model, tokens, tmp_path / "x", config, seed=1)
    alone: dict[str, Any] = {}
    for seed, (name, rank) in enumerate(RANKS.items(), start=1):
        own = config.model_copy(update={"rank": rank, "alpha": 2.0 * rank})
        if name != "default":
            attach_further(setup.model, name, own, seed=seed)
        alone[name] = prepare_training(base_model, tokens, tmp_path / "x", own, seed=seed)
    for name, other in alone.items():
        torch.manual_seed(9)
        with torch.no_grad():
            for path, parameter in other.parameters.items():
                if "lora_B" in path:
                    parameter.normal_(std=0.1)
        mine = list_adapters(setup.model, name)
        theirs = list_adapters(other.model, "default")
        for (a, b, scale), (own_a, own_b, own_scale) in zip(mine.values(), theirs.values(), strict=True):
            assert torch.equal(a, own_a)  # drawn alike
            assert scale == own_scale
            b.data.copy_(own_b)
    rows = {"default": [0, 1, 2, 3], "b": [4, 5], "c": []}
    names = list(RANKS)
    lanes = build_lanes(setup.engine, setup.model, names, config, step_tokens=512)
    assert not is_bound or None not in lanes.bind_gradients()
    batches = [lanes.form_step(setup.table, [[row] for row in rows[name]]) if rows[name] else [None] for name in names]
    found = lanes.compute_log_probs([each[0] for each in batches])
    assert [len(each) == 0 for each in found] == [False, False, True]
    torch.stack([each.sum() * weight for each, weight in zip(found, (1.0, 0.5, 1.0), strict=True)]).sum().backward()
    for name, each, weight in zip(names, found, (1.0, 0.5, 1.0), strict=True):
        other = alone[name]
        if not rows[name]:
            grads = [matrix.grad for a, b, _ in list_adapters(setup.model, name).values() for matrix in (a, b)]
            assert all(grad is None or not grad.any() for grad in grads)
            continue
        (batch,) = replace(other.engine, tokens_per_forward=512).form_step(other.table, [[row] for row in rows[name]])
        log_probs = other.engine.compute_log_probs(batch)
        assert torch.allclose(each, log_probs, atol=1e-5)
        (weight * log_probs.sum()).backward()
        pairs = zip(
            list_adapters(setup.model, name).values(), list_adapters(other.model, "default").values(), strict=True
        )
        for of_lane, by_itself in pairs:
            for mine_of, wanted in zip(of_lane[:2], by_itself[:2], strict=True):
                assert mine_of.grad is not None
                assert wanted.grad is not None
                assert float((mine_of.grad - wanted.grad).norm()) <= 1e-5 * float(wanted.grad.norm())


def test_what_has_no_lanes_says_so(tmp_path: Path) -> None:
    base_model, tokens = build_family(tmp_path / "model", "llama"), write_tokens(tmp_path / "tokens", num_train=4)
    for changes, words in (({"dropout": 0.1}, "dropout"), ({"engine": "general"}, "the fused engine does not")):
        config = TrainingConfig(**{"rank": 4, "alpha": 8, "engine": "fused", **changes})
        setup = prepare_training(base_model, tokens, tmp_path / "x", config, seed=1)
        assert collect_trained(setup.model)
        with pytest.raises(UnknownDecoderError, match=words):
            build_lanes(setup.engine, setup.model, ["default"], config, step_tokens=64)
