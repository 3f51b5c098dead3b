"""The routers' auxiliary loss is transformers' own, whatever way an engine takes, and only where it is asked for."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from schemas.config import TrainingConfig
from tasks.training.batches import Batch, form_batch, form_flat_batch
from tasks.training.engines.choice import choose_engine
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.general import GeneralEngine
from tasks.training.lora import attach_adapter
from tasks.training.records import TrainingError
from tasks.training.token_table import TokenTable
from tests.tasks.families.tiny import build_model

CPU = torch.device("cpu")


def build_table(*lengths: int) -> TokenTable:
    """Return examples of random tokens, each predicting the next one from its third."""
    generator = np.random.default_rng(5)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    ids = generator.integers(2, 97, offsets[-1]).astype(np.int32)
    targets = np.append(ids[1:], -100).astype(np.int32)
    for begin, end in pairwise(offsets):
        targets[begin : begin + 2] = -100
        targets[end - 1] = -100
    return TokenTable([f"e{number}" for number in range(len(lengths))], offsets, ids, targets)


def build_engine(case: str, table: TokenTable, **settings: Any) -> GeneralEngine | FusedEngine:
    return build_both(case, table, **settings)[0]


def build_both(case: str, table: TokenTable, **settings: Any) -> tuple[GeneralEngine | FusedEngine, Any]:
    """Return engine and model, a tiny one whose config asks for the loss as it would in a checkpoint."""
    model: Any = build_model(case)
    model.config.get_text_config().output_router_logits = True
    config = TrainingConfig.model_validate({"rank": 4, "micro_batch": 2, **settings})
    adapted = attach_adapter(model, config, seed=0)
    rows = [[index] for index in range(len(table.example_ids))]
    engine, _ = choose_engine(adapted, table, rows, config, device=CPU, dtype=torch.float32)
    assert isinstance(engine, GeneralEngine | FusedEngine)
    adapted.eval()
    return engine, adapted


def form(engine: GeneralEngine | FusedEngine, table: TokenTable) -> Batch:
    if isinstance(engine, GeneralEngine) and engine.attend is None:
        return form_batch(table, [[0], [1]])
    return form_flat_batch(table, [0, 1])


def transformers_loss(case: str, table: TokenTable, indices: list[int], coefficient: float) -> float:
    """Return what transformers computes for rows padded on the right, a trained token; a fresh adapter adds nothing."""
    model: Any = build_model(case)
    batch = form_batch(table, [[index] for index in indices])
    mask = torch.zeros_like(batch.input_ids)
    for row, index in enumerate(indices):
        mask[row, : table.lengths[index]] = 1
    # transformers shifts by itself: the label of a token stands at its own place.
    labels = torch.full_like(batch.targets, -100)
    labels[:, 1:] = batch.targets[:, :-1]
    model.router_aux_loss_coef = coefficient
    with torch.no_grad():
        result = model(input_ids=batch.input_ids, attention_mask=mask, labels=labels, output_router_logits=True)
    return float(result.loss)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("mixtral", "general"),
        ("qwen3_moe", "general"),
        ("qwen3_moe", "fused"),
        ("gpt_oss", "general"),
        ("gpt_oss", "fused"),
        ("granitemoe", "general"),
    ],
)
@pytest.mark.parametrize("lengths", [(24, 24), (30, 17)], ids=["equal", "padded"])
def test_it_is_transformers_own(case: str, kind: str, lengths: tuple[int, int]) -> None:
    table = build_table(*lengths)
    engine = build_engine(case, table, router_aux_loss_coef=0.5, engine=kind)
    batch = form(engine, table)
    loss = engine.sum_losses(batch) / batch.num_trained_tokens
    expected = transformers_loss(case, table, [0, 1], 0.5)
    assert float(loss.detach()) == pytest.approx(expected, rel=2e-6)
    # It is no small part: without it the loss would be another.
    assert expected - transformers_loss(case, table, [0, 1], 0.0) > 0.3
    with torch.no_grad():
        held_out = engine.sum_losses(batch) / batch.num_trained_tokens
    assert float(held_out) == pytest.approx(transformers_loss(case, table, [0, 1], 0.0), rel=2e-6)


def test_the_models_config_says_how_much_and_zero_switches_it_off() -> None:
    table = build_table(12, 12)
    assert build_engine("mixtral", table).router_loss is not None
    assert build_engine("mixtral", table, router_aux_loss_coef=0).router_loss is None


@pytest.mark.parametrize("kind", ["fused", "general"])
def test_layers_that_run_again_give_the_same_gradient(kind: str) -> None:
    table = build_table(20, 20)
    grads = []
    for recompute in (False, True):
        engine, model = build_both(
            "qwen3_moe", table, router_aux_loss_coef=0.5, gradient_checkpointing=recompute, engine=kind
        )
        model.train()
        assert (engine.num_recomputed > 0) is recompute
        engine.sum_losses(form(engine, table)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-5) for name in grads[0])
    assert any(grad.any() for grad in grads[0].values())


def test_a_model_without_routers_is_told() -> None:
    with pytest.raises(TrainingError, match=r"router_aux_loss_coef is 0\.5, but this Starcoder2ForCausalLM has no aux"):
        build_engine("starcoder2", build_table(12, 12), router_aux_loss_coef=0.5)
