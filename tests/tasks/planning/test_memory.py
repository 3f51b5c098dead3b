"""What is counted without values is what the training holds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.config import TrainingConfig
from tasks.models import load_model
from tasks.planning.memory import count_flop, count_need, fits, list_options
from tasks.training.lora import collect_trained
from tasks.training.methods import attach_trained
from tasks.training.throughput import count_useful_flop

MODEL = Path(__file__).parents[3] / "deploy" / "demo" / "base_model"
CONFIGS = [
    TrainingConfig(rank=8),
    TrainingConfig(rank=4, target_modules=("q_proj", "down_proj")),
    TrainingConfig(method="full"),
    TrainingConfig(method="freeze", trained_layers=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method} {config.target_modules[0]}")
def test_weights_and_optimizer_are_counted_to_the_byte(config: TrainingConfig) -> None:
    model = attach_trained(load_model(MODEL, dtype=torch.float32), config, seed=0)
    trained = collect_trained(model)
    frozen = {id(p): p for name, p in model.named_parameters() if name not in trained}
    need = count_need(MODEL, config, dtype=torch.float32, longest=100)
    assert need.num_trained == sum(parameter.numel() for parameter in trained.values())
    assert need.trained_bytes == 16 * need.num_trained
    assert need.weights_bytes == sum(4 * parameter.numel() for parameter in frozen.values())
    assert count_flop(MODEL, config) == count_useful_flop(model)


def test_what_would_make_it_fit_does_fit_and_the_config_itself_does_not() -> None:
    config = TrainingConfig(method="full", micro_batch=8)
    whole: dict[str, Any] = {"dtype": torch.float32, "longest": 64}
    need = count_need(MODEL, config, **whole)
    assert list_options(MODEL, config, capacity_bytes=2 * need.least_bytes, **whole) == ()
    capacity = int(0.8 * need.least_bytes / 0.9)
    assert not fits(need, capacity)
    options = list_options(MODEL, config, capacity_bytes=capacity, **whole)
    assert "training.optimizer adamw_8bit" in [option.settings for option in options]
    assert all(option.least_bytes <= 0.9 * capacity for option in options)
    assert list_options(MODEL, config, capacity_bytes=1000, **whole) == ()
