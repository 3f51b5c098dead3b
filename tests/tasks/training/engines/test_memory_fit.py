"""What a GPU's free memory is used for, with the two measurements given by hand."""

from typing import Any

import pytest
import torch

from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.recognition import recognize_decoder
from tasks.training.engines import memory_fit
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.memory_fit import fit_memory
from tasks.training.engines.pass_need import Need
from tests.tasks.decoder.small_models import build

KEPT, LEAN = Need(0.0, 1600.0), Need(0.0, 100.0)
"""Of a model of three layers: what one keeps of a token takes 500 bytes."""


@pytest.fixture
def engine() -> FusedEngine:
    decoder = recognize_decoder(build("llama", torch.float32))
    assert len(decoder.layers) == 3
    return FusedEngine(decoder, torch.device("cpu"), 2048, 0, LOGITS_BYTES, 2048)


def fit(engine: FusedEngine, monkeypatch: pytest.MonkeyPatch, *, free: float, **settings: Any) -> tuple[int, int]:
    """Return tokens of a pass and recomputed layers."""
    monkeypatch.setattr(memory_fit, "_read_free", lambda device: free / memory_fit._SHARE)
    monkeypatch.setattr(memory_fit, "_measure_all", lambda engine, *others: LEAN if engine.num_recomputed else KEPT)
    found = fit_memory(engine, trained=[], **{"most_tokens": 65536, "recompute": None, **settings})
    return found.tokens_per_forward, found.num_recomputed


@pytest.mark.parametrize(
    ("free", "settings", "expected"),
    [
        (1600 * 65536, {}, (65536, 0)),
        (1600 * 8192, {}, (8192, 0)),
        (1100 * 8192, {}, (8192, 1)),  # 100 for all and 500 for a layer
        (600 * 8192, {}, (8192, 2)),
        (590 * 8192, {}, (8192, 3)),
        (100 * 4096, {}, (4096, 3)),
        # A step of fewer tokens leaves memory for as much.
        (1600 * 2048, {"most_tokens": 2048}, (2048, 0)),
        (1100 * 2048, {"most_tokens": 2048}, (2048, 1)),
        (1100 * 8192, {"most_tokens": 8192}, (8192, 1)),
        (590 * 2048, {"most_tokens": 2048}, (2048, 3)),
        # A longer example has to fit first.
        (590 * 16384, {"longest_pass": 16384}, (16384, 3)),
        (600 * 16384, {"longest_pass": 16384}, (16384, 2)),
        (1600 * 65536, {"recompute": True}, (65536, 3)),
        (100 * 65536, {"recompute": False}, (4096, 0)),
    ],
)
def test_memory_that_is_left_keeps_layers(
    engine: FusedEngine,
    monkeypatch: pytest.MonkeyPatch,
    free: float,
    settings: dict[str, Any],
    expected: tuple[int, int],
) -> None:
    assert fit(engine, monkeypatch, free=free, **settings) == expected
