"""What layers keep is counted for dense models with an adapter, and unknown elsewhere; test_measured has real ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from schemas.config import TrainingConfig
from tasks.planning.kept import count_kept

_HIDDEN, _WIDTH, _QUERIES, _KEYS, _RANK = 64, 160, 64, 32, 4


def save_config(folder: Path, kind: str = "llama", **settings: Any) -> Path:
    sizes = {"hidden_size": _HIDDEN, "intermediate_size": _WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2}
    AutoConfig.for_model(kind, **{**sizes, "vocab_size": 96, "num_hidden_layers": 2, **settings}).save_pretrained(
        folder
    )
    return folder


def count(folder: Path, **settings: Any) -> float:
    config = TrainingConfig.model_validate({"rank": _RANK, "alpha": 8, **settings})
    return count_kept(folder, config, torch.bfloat16)


def test_a_layer_keeps_its_states_once_and_a_value_for_each_rank_of_its_seven_adapters(tmp_path: Path) -> None:
    two, three = (count(save_config(tmp_path / str(n), num_hidden_layers=n)) for n in (2, 3))
    # The stream and what is normed of it, before attention and before the gated layer; the sum of squares of each.
    states = 2 * (2 * _HIDDEN) * 2 + 2 * 4
    # FlashAttention's queries, keys, values, output, and a value of fp32 for each of four heads.
    attention = (2 * _QUERIES + 2 * _KEYS) * 2 + 4 * 4
    gated = 2 * _WIDTH * 2
    low = three - two - states - attention - gated
    assert 0 <= low <= 7 * _RANK * 2 + 2 * _WIDTH
    assert count(save_config(tmp_path / "wide", intermediate_size=320)) - two == 2 * 2 * (320 - _WIDTH) * 2


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"kind": "mixtral", "num_local_experts": 4}, {}),  # rows of an expert depend on values
        ({"kind": "cohere"}, {}),  # the general engine's
        ({}, {"engine": "general"}),
        ({}, {"base_weights": "fp8"}),
        ({}, {"method": "full"}),
        ({}, {"sweep": {"learning_rates": [1e-4, 2e-4]}}),
    ],
)
def test_elsewhere_it_is_unknown(tmp_path: Path, model: dict[str, Any], settings: dict[str, Any]) -> None:
    assert count(save_config(tmp_path, **model), **settings) == 0.0
