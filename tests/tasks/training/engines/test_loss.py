"""The same loss and gradient whatever the arrangement: padded, packed, accumulated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from schemas.config import TrainingConfig
from tasks.models import load_model
from tasks.training.batches import Batch, form_batch
from tasks.training.engines.loss import isolates_packed, sum_token_losses
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.token_table import TokenTable
from tests.tasks.training.conftest import KINDS, build_model, draw_examples, read_tokens, write_split

CPU = torch.device("cpu")


@pytest.fixture(params=KINDS)
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A model with an adapter that already does something."""
    model = load_model(build_model(tmp_path / "model", request.param))
    model = attach_adapter(model, TrainingConfig(rank=4, alpha=8), seed=3)  # type: ignore[assignment]
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in collect_trained(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


@pytest.fixture
def table(tmp_path: Path) -> TokenTable:
    write_split(tmp_path / "train.parquet", draw_examples(12, seed=7, shortest=3, longest=30))
    return read_tokens(tmp_path / "train.parquet")[0]


def differentiate(model: Any, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of one optimizer step."""
    count = sum(batch.num_trained_tokens for batch in batches)
    loss = 0.0
    for batch in batches:
        part = sum_token_losses(model, batch) / count
        part.backward()
        loss += part.item()
    gradients = {}
    for name, parameter in collect_trained(model).items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.clone()
        parameter.grad = None
    return loss, gradients


def assert_same(
    left: tuple[float, dict[str, torch.Tensor]], right: tuple[float, dict[str, torch.Tensor]], limit: float
) -> None:
    assert left[0] == pytest.approx(right[0], abs=limit)
    largest = max(float((left[1][name] - right[1][name]).abs().max()) for name in left[1])
    assert largest <= limit
    assert max(float(gradient.abs().max()) for gradient in left[1].values()) > 1e-2  # there is something to compare


def test_packed_and_unpacked_agree(adapted: Any, table: TokenTable, tmp_path: Path) -> None:
    _, rows = read_tokens(tmp_path / "train.parquet", packing=True, tokens_per_pack=48)
    assert max(len(row) for row in rows) >= 3
    packed = differentiate(adapted, [form_batch(table, rows[:2]), form_batch(table, rows[2:])])
    alone = differentiate(adapted, [form_batch(table, [[i]]) for i in range(12)])
    assert_same(packed, alone, 1e-5)


def test_accumulation_changes_nothing(adapted: Any, table: TokenTable) -> None:
    together = differentiate(adapted, [form_batch(table, [[0], [1], [2], [3]])])
    one_by_one = differentiate(adapted, [form_batch(table, [[i]]) for i in range(4)])
    assert len({int(length) for length in table.lengths[:4]}) == 4
    assert_same(together, one_by_one, 1e-5)


def test_what_stands_before_an_example_in_its_pack_does_not_matter(adapted: Any, table: TokenTable) -> None:
    assert isolates_packed(adapted.eval(), table, CPU)
    batch = form_batch(table, [[0, 1]])
    start = int(table.lengths[0])
    with torch.no_grad():
        first = adapted(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        batch.input_ids[:, :start] = 5
        second = adapted(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    assert torch.equal(first[:, start:], second[:, start:])
    assert not torch.equal(first[:, :start], second[:, :start])


def test_recurrent_model_is_found_not_to_isolate(table: TokenTable) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1, initializer_range=0.5)
    assert not isolates_packed(MambaForCausalLM(config).eval(), table, CPU)


def test_no_trained_position_gives_zero_not_nan(adapted: Any, table: TokenTable) -> None:
    batch = form_batch(table, [[0], [1]])
    batch.targets.fill_(-100)
    assert sum_token_losses(adapted, batch).item() == 0.0
