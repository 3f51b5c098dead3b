"""Adapters of routed experts beside the frozen products, against PEFT's copy of the adapted weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.config import TrainingConfig
from tasks.decoder.grouped_products import multiply_grouped
from tasks.training.engines.expert_adapters import use_factored_adapters
from tasks.training.lora import attach_adapter, collect_trained
from tests.tasks.families.tiny import VOCABULARY, build_model

# With a gate and without, biases, transposed weights, a gate of its own, a composite's text part.
FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h", "qwen3_vl_moe", "granitemoe", "deepseek_v3", "gemma4_moe"]


def take(model: Any, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    trained = collect_trained(model)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
    model.zero_grad()
    return float(loss.detach()), grads


def build(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = attach_adapter(build_model(family), TrainingConfig(rank=4, **settings), seed=1)
    for parameter in collect_trained(model).values():
        parameter.data = 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_pefts(family: str) -> None:
    model = build(family)
    ids = torch.randint(5, VOCABULARY - 5, (2, 30))
    loss, grads = take(model, ids)
    give_back = use_factored_adapters(model)
    assert give_back is not None
    found_loss, found = take(model, ids)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        assert float((found[name] - grad).norm()) < 1e-4 * float(grad.norm()), name
    give_back()
    assert take(model, ids)[0] == loss


def test_frozen_weights_are_not_copied() -> None:
    model = build("qwen3_moe")
    assert use_factored_adapters(model) is not None
    experts = next(module for module in model.modules() if hasattr(module, "is_transposed"))
    sizes = {experts.gate_up_proj.numel(), experts.down_proj.numel()}
    frozen = {parameter.data_ptr() for parameter in model.parameters()}
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in frozen:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.arange(20)[None])
    assert kept
    assert not sizes & set(kept)


def test_a_switched_off_adapter_is_the_base() -> None:
    model = build("qwen3_moe")
    ids = torch.arange(20)[None]
    with torch.no_grad(), model.disable_adapter():
        wanted = model(input_ids=ids).logits
        assert use_factored_adapters(model) is not None
        assert torch.equal(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("settings", [{"target_modules": ("q_proj",)}])
def test_models_without_adapted_experts_are_left_alone(settings: dict[str, Any]) -> None:
    assert use_factored_adapters(build("qwen3_moe", **settings)) is None
    assert use_factored_adapters(build("qwen3")) is None


def test_experts_without_rows_and_rows_of_one_expert() -> None:
    rows, weights = torch.randn(5, 3), torch.randn(4, 3, 2)
    found = multiply_grouped(rows, weights, torch.tensor([0, 5, 5, 5], dtype=torch.int32))
    torch.testing.assert_close(found, rows @ weights[1])
    assert multiply_grouped(rows[:0], weights, torch.zeros(4, dtype=torch.int32)).shape == (0, 2)
