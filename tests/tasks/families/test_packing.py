"""Packs longer than what a family's attention counts by give each example the loss that it has alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from schemas.config import TrainingConfig
from tasks.families.packing import find_row_limit
from tasks.training.batches import form_batch
from tasks.training.engines.choice import choose_engine
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.loss import sum_token_losses
from tasks.training.lora import attach_adapter
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


@pytest.mark.parametrize("longest", [0, 65])
def test_the_fused_engine_takes_examples_whose_positions_turn_alike(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}
    monkeypatch.setitem(tiny.SETTINGS, "phi3", settings)
    config = TrainingConfig(rank=4)
    model = attach_adapter(tiny.build_model("phi3"), config, seed=0)
    table = build_table(64, 30)
    cpu = torch.device("cpu")
    engine, notes = choose_engine(model, table, [[0], [1]], config, device=cpu, dtype=torch.float32, longest=longest)
    assert isinstance(engine, FusedEngine) is (longest == 0)
    said = "its positions turn with another frequency in rows above 64 tokens, and an example has 65"
    assert any(said in note for note in notes) is (longest == 65)


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
