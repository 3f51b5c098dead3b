from pathlib import Path

import pytest
import torch

from schemas.config import TrainingConfig
from tasks.models import load_model
from tasks.training.lora import attach_adapter
from tasks.training.throughput import count_useful_flop, measure_peak
from tests.tasks.training.conftest import build_model


@pytest.mark.parametrize("tied", [True, False])
def test_useful_flop_by_hand(tmp_path: Path, tied: bool) -> None:
    model = load_model(build_model(tmp_path, tie_word_embeddings=tied))
    # q, k, v, o of 32 -> 32, 16, 16 and 32 -> 32; gate and up 32 -> 48, down 48 -> 32; two layers; the head 32 -> 97.
    weights = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) + 32 * 97
    assert count_useful_flop(attach_adapter(model, TrainingConfig(rank=4), seed=0)) == 4 * weights


def test_peak_of_this_machine_is_plausible() -> None:
    # Anything from a slow CPU (0.1 GFLOP/s) to one of tomorrow.
    peak = measure_peak(torch.device("cpu"), size=128, repeats=2)
    assert peak is not None
    assert 1e8 < peak < 1e15
