"""4-bit frozen weights through bitsandbytes, which computes them on a CPU as well."""

from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.config import TrainingConfig
from tasks.models import load_model
from tasks.training.batches import form_batch
from tasks.training.engines.loss import sum_token_losses
from tasks.training.frozen import load_4_bit, load_base
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.records import TrainingError
from tasks.training.throughput import count_useful_flop
from tests.tasks.training.conftest import build_model, read_tokens

CPU = torch.device("cpu")
CONFIG = TrainingConfig(rank=8, alpha=16, base_weights="nf4")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return build_model(tmp_path_factory.mktemp("llama"), "llama", **shape)


@pytest.fixture(scope="module")
def in_4_bits(llama: Path) -> Any:
    pytest.importorskip("bitsandbytes", reason="the extra nf4 is not installed", exc_type=ImportError)
    model: Any = load_4_bit(llama, dtype=torch.float32, device=CPU)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else a pass in eval mode takes the gradient away: see load_base
    return model


@pytest.mark.parametrize("weights", ["fp8", "nf4"])
def test_weights_that_need_a_gpu_are_refused_on_a_cpu(llama: Path, weights: str) -> None:
    config = TrainingConfig.model_validate({"base_weights": weights})
    with pytest.raises(TrainingError, match=f"base_weights is {weights}, which needs a GPU.*set it to full"):
        load_base(llama, config, dtype=torch.float32, device=CPU)


def test_linear_layers_take_half_a_byte_a_weight(llama: Path, in_4_bits: Any) -> None:
    full: Any = load_model(llama)
    weight = in_4_bits.model.layers[1].mlp.down_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 128 // 2)
    assert torch.equal(in_4_bits.lm_head.weight, full.lm_head.weight)
    assert torch.equal(in_4_bits.model.embed_tokens.weight, full.model.embed_tokens.weight)
    in_4_bits.requires_grad_(False)
    assert count_useful_flop(in_4_bits) == count_useful_flop(full.requires_grad_(False))


def test_loss_and_gradients_are_those_of_the_weights_it_stands_for(llama: Path, in_4_bits: Any, tokens: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    full: Any = load_model(llama)
    modules = dict(in_4_bits.named_modules())
    with torch.no_grad():
        for name, module in full.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                weight = modules[name].weight
                stands_for = dequantize_4bit(weight.data, weight.quant_state)
                error = (stands_for - module.weight).norm() / module.weight.norm()
                assert 0.05 < error < 0.12, name  # NF4 of normal values: about 0.09
                module.weight.copy_(stands_for)
    batch = form_batch(read_tokens(tokens / "train.parquet")[0], [[0], [1], [2]])
    results = []
    for base in (full, in_4_bits):
        model = attach_adapter(base, CONFIG, seed=0)
        with torch.no_grad():
            for name, parameter in collect_trained(model).items():
                if ".lora_B." in name:
                    parameter.fill_(0.01)
        loss_sum = sum_token_losses(model, batch)
        loss_sum.backward()
        results.append((loss_sum.item(), [parameter.grad for parameter in collect_trained(model).values()]))
    (loss, grads), (loss_in_4_bits, grads_in_4_bits) = results
    assert loss_in_4_bits == pytest.approx(loss, rel=1e-5)
    assert len(grads) == 2 * 2 * 7
    for grad, other in zip(grads, grads_in_4_bits, strict=True):
        assert grad is not None
        assert other is not None
        assert (other - grad).norm() <= 1e-4 * grad.norm()
