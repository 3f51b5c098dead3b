"""Packs longer than what a family's attention counts by give each example the loss that it has alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from schemas.config import TrainingConfig
from tasks.families.packing import find_row_limit
from tasks.training.batches import form_batch
from tasks.training.engines.choice import _exclude_long, choose_engine
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.loss import sum_token_losses
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.records import TrainingError
from tests.tasks.families import tiny
from tests.tasks.training.engines.test_router_loss import build_table

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.5,
}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("llama4_text", {"attention_chunk_size": 64}),
        ("llama4_text", {"attention_chunk_size": 512, "floor_scale": 64}),
        ("glm_moe_dsa", {"index_topk": 64}),
        ("ministral3", {"rope_parameters": YARN}),
        ("mistral", {"sliding_window": 16}),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    ],
)
def test_packed_examples_stay_apart(case: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.SETTINGS, case, {**tiny.SETTINGS[case], **settings})
    config = TrainingConfig(rank=4, packing=True, tokens_per_pack=256, micro_batch=2)
    table = build_table(100, 100, 50)
    plain = attach_adapter(tiny.build_model(case), config, seed=0).eval()
    model = attach_adapter(tiny.build_model(case), config, seed=0)
    engine, _ = choose_engine(model, table, [[0, 1, 2]], config, device=torch.device("cpu"), dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        alone = sum(float(sum_token_losses(plain, form_batch(table, [[index]]))) for index in range(3))
        packed = sum(float(engine.sum_losses(batch)) for batch in engine.form_step(table, [[0, 1, 2]]))
    assert packed == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(("case", "shared", "is_fused"), [("phi3", 1, True), ("phi3", 2, False), ("llama", 1, False)])
def test_the_fused_engine_takes_examples_that_choose_their_frequencies(
    case: str, shared: int, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their own length, whatever lies beside them; where ranks share an example's tokens, none knows it."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    rope = LONGROPE if case == "phi3" else dynamic
    settings = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    monkeypatch.setitem(tiny.SETTINGS, case, settings)
    model = attach_adapter(tiny.build_model(case), TrainingConfig(rank=4), seed=0)
    config: Any = SimpleNamespace(context_parallel=shared)
    reason = _exclude_long(model, config, 65)
    assert bool(reason) is not is_fused
    assert is_fused or "in rows above 64 tokens, and an example has 65" in reason
    assert not _exclude_long(model, config, 64)


def test_long_and_short_examples_have_the_gradient_that_they_have_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}
    monkeypatch.setitem(tiny.SETTINGS, "phi3", settings)
    table, config, cpu = build_table(100, 20, 64, 65, 30), TrainingConfig(rank=4, precision="fp32"), torch.device("cpu")

    def build() -> Any:
        model = attach_adapter(tiny.build_model("phi3"), config, seed=0)
        torch.manual_seed(0)
        with torch.no_grad():
            for matrix in collect_trained(model).values():
                matrix.normal_(0, 0.1)
        return model

    plain, model = build().eval(), build()
    alone = torch.stack([sum_token_losses(plain, form_batch(table, [[index]])) for index in range(5)]).sum()
    alone.backward()
    engine, notes = choose_engine(model, table, [[0], [1]], config, device=cpu, dtype=torch.float32)
    assert isinstance(engine, FusedEngine), notes
    loss = engine.sum_losses(engine.form_trial(table))
    loss.backward()
    assert float(loss) == pytest.approx(float(alone), rel=1e-6)
    wanted = collect_trained(plain)
    for name, matrix in collect_trained(model).items():
        found, exact = matrix.grad, wanted[name].grad
        assert found is not None
        assert exact is not None
        assert (found - exact).norm() < 1e-4 * exact.norm(), name


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = TrainingConfig(rank=4)
    model = attach_adapter(tiny.build_model("gemma3_text"), config, seed=0)
    model.config.use_bidirectional_attention = True
    with pytest.raises(TrainingError, match="Gemma3ForCausalLM sees the tokens after the one"):
        choose_engine(model, build_table(20, 20), [[0]], config, device=torch.device("cpu"), dtype=torch.float32)


def test_the_limit_is_the_smallest() -> None:
    chosen = SimpleNamespace(indexer_budget=64)  # of Qwen 4's groups of tokens
    assert find_row_limit(chosen) == (0, "its attention chooses 64 groups of neighbouring tokens of the row")
    assert find_row_limit(tiny.build_config("qwen3")) is None
    config = tiny.build_config("llama4_text")
    assert find_row_limit(config) == (64, "its attention works in chunks of 64 tokens from the row's start")
    config.floor_scale = 32
    limit = find_row_limit(config)
    assert limit is not None
    assert limit[0] == 32
