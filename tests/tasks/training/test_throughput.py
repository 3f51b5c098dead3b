from pathlib import Path

import pytest
import torch
from torch import nn

from schemas.config import TrainingConfig
from tasks.models import load_model
from tasks.training.lora import attach_adapter
from tasks.training.throughput import count_useful_flop, measure_peak
from tests.tasks.decoder import small_models
from tests.tasks.training.conftest import build_model


@pytest.mark.parametrize("tied", [True, False])
def test_useful_flop_by_hand(tmp_path: Path, tied: bool) -> None:
    model = load_model(build_model(tmp_path, tie_word_embeddings=tied))
    # q, k, v, o of 32 -> 32, 16, 16 and 32 -> 32; gate and up 32 -> 48, down 48 -> 32; two layers; the head 32 -> 97.
    weights = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 32 * 97
    assert count_useful_flop(attach_adapter(model, TrainingConfig(rank=4), seed=0)) == 4 * weights


@pytest.mark.parametrize(("family", "chosen", "experts"), [("qwen3_moe", 2, 6), ("mixtral", 2, 6), ("gpt_oss", 2, 6)])
def test_of_routed_experts_those_count_that_a_token_is_sent_to(family: str, chosen: int, experts: int) -> None:
    model = small_models.make_model(family)
    stacks = [weight for name, weight in model.named_parameters() if ".experts." in name and weight.dim() == 3]
    assert {len(stack) for stack in stacks} == {experts}
    adapted = attach_adapter(model, TrainingConfig(rank=4), seed=0)
    rest = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora" not in name
    )
    wanted = 4 * (rest + sum(stack.numel() for stack in stacks) * chosen / experts)
    assert count_useful_flop(adapted) == pytest.approx(wanted)


def test_peak_of_this_machine_is_plausible() -> None:
    # Anything from a slow CPU (0.1 GFLOP/s) to one of tomorrow.
    peak = measure_peak(torch.device("cpu"), size=128, repeats=2)
    assert peak is not None
    assert 1e8 < peak < 1e15
