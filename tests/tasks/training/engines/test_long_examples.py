"""What is done for examples that do not fit with every layer recomputed, with the measurements given by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from schemas.config import TrainingConfig
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.host_inputs import CHUNK_BYTES
from tasks.decoder.pieces import PIECE_TOKENS
from tasks.decoder.recognition import recognize_decoder
from tasks.host_memory import HOST_SHARE
from tasks.training.engines import choice, long_examples, memory_fit
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.long_examples import choose_in_host, count_input_bytes
from tasks.training.engines.memory_fit import fit_memory
from tasks.training.engines.pass_need import Need
from tasks.training.records import TrainingError
from tasks.training.token_table import TokenTable
from tests.tasks.decoder.small_models import build

LAYERS, ROW = 3, 128
"""Layers of the small model, and bytes of a token in a layer's input: 64 columns of bf16."""
KEPT, LEAN, PIECES = Need(0.0, 8000.0), Need(0.0, 1000.0), Need(0.0, 600.0)
PIECE_BYTES = PIECE_TOKENS * (1000 - LAYERS * ROW)
"""Of one piece, at most."""
LONG = 1 << 20
PLENTY = 100 * CHUNK_BYTES


def make_engine(family: str = "llama") -> FusedEngine:
    decoder = recognize_decoder(build(family, torch.bfloat16))
    return FusedEngine(decoder, torch.device("cpu"), 2048, 0, LOGITS_BYTES, 2048)


def fit(
    monkeypatch: pytest.MonkeyPatch, *, free: float, longest: int = LONG, host: float = PLENTY, family: str = "llama"
) -> FusedEngine:
    def measure(engine: FusedEngine, *others: Any) -> Need:
        return (PIECES if engine.piece_tokens else LEAN) if engine.num_recomputed else KEPT

    monkeypatch.setattr(memory_fit, "_read_free", lambda device: free / memory_fit._SHARE)
    monkeypatch.setattr(memory_fit, "_measure_all", measure)
    monkeypatch.setattr(long_examples, "read_free_host", lambda: host / HOST_SHARE)
    return fit_memory(
        make_engine(family), trained=[], most_tokens=2 * LONG, recompute=None, longest_pass=longest, longest=longest
    )


def test_nothing_is_done_where_every_example_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fit(monkeypatch, free=1000 * LONG)
    assert (engine.piece_tokens, engine.num_in_host, engine.longest_fit) == (0, 0, 0)
    assert (engine.num_recomputed, engine.host) == (LAYERS, None)


def test_pieces_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_input_bytes(make_engine()) == ROW
    for free in (1000 * LONG - 1, 600 * LONG + PIECE_BYTES):
        engine = fit(monkeypatch, free=free)
        assert (engine.piece_tokens, engine.num_in_host, engine.longest_fit) == (PIECE_TOKENS, 0, 0)
        assert engine.num_recomputed == LAYERS
        assert engine.tokens_per_forward == 65536
        assert "gated layers in pieces of 8,192 tokens" in engine.describe()


def test_then_inputs_lie_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two of three layers, and two on their way on the device: no less than before.
    engine = fit(monkeypatch, free=600 * LONG + PIECE_BYTES - 1)
    assert (engine.piece_tokens, engine.num_in_host) == (PIECE_TOKENS, LAYERS - 1)
    assert engine.longest_fit == 0  # it may fit into what is never planned for
    assert engine.host is not None
    assert "inputs of 2 layers in the host's memory" in engine.describe()


def test_examples_within_a_piece_gain_nothing_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fit(monkeypatch, free=999 * PIECE_TOKENS, longest=PIECE_TOKENS)
    assert engine.piece_tokens == 0


def test_routed_experts_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(monkeypatch, free=700 * LONG + PIECE_BYTES, family="olmoe").piece_tokens == 0


@pytest.mark.parametrize(
    ("free", "host", "expected"),
    [
        # 32 layers of 100 bytes a token, and 200 for a layer's work: 3,400 a token, 100 less for each layer but two.
        (3400 * LONG - 1, 1e15, (3, LONG)),
        (3300 * LONG, 1e15, (3, LONG)),
        (3300 * LONG - 1, 1e15, (4, LONG)),
        (500 * LONG, 1e15, (31, LONG)),
        (500 * LONG - 1, 1e15, (31, LONG - 1)),
        # 28 inputs are to be there, of 104,857,600 bytes each, in two chunks of 64 MiB.
        (800 * LONG, 28 * 2 * CHUNK_BYTES, (28, LONG)),
    ],
)
def test_as_few_inputs_as_it_takes(free: float, host: float, expected: tuple[int, int]) -> None:
    number, longest = choose_in_host(Need(0.0, 3400.0), 100, 32, free_bytes=free, host_bytes=host, longest=LONG)
    assert number == expected[0]
    assert longest >= LONG if expected[1] == LONG else longest == expected[1]


def test_a_small_host_takes_what_it_can() -> None:
    number, longest = choose_in_host(
        Need(0.0, 3400.0), 100, 32, free_bytes=800 * LONG, host_bytes=27 * 2 * CHUNK_BYTES, longest=LONG
    )
    assert number == 27
    assert 0.8 * LONG < longest < LONG
    # That one fits by the same arithmetic.
    again, at_most = choose_in_host(
        Need(0.0, 3400.0), 100, 32, free_bytes=800 * LONG, host_bytes=27 * 2 * CHUNK_BYTES, longest=longest
    )
    assert at_most == longest
    assert (3600 - 100 * again) * longest <= 800 * LONG
    assert again * -(-longest * 100 // CHUNK_BYTES) * CHUNK_BYTES <= 27 * 2 * CHUNK_BYTES


def take(monkeypatch: pytest.MonkeyPatch, engine: FusedEngine) -> None:
    """Go on as a training does with what was fitted, for one example."""
    monkeypatch.setattr(choice, "fit_memory", lambda *arguments, **settings: engine)
    nothing = np.zeros(0, np.int32)
    table = TokenTable(["long"], np.array([0, LONG]), nothing, nothing)
    choice.fit_fused(engine, table, TrainingConfig(), [], most_tokens=LONG)


def test_an_example_for_which_nothing_is_enough_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fit(monkeypatch, free=300 * LONG + PIECE_BYTES)
    assert engine.longest_fit == LONG // 2
    with pytest.raises(TrainingError, match=r"1,048,576 tokens, and here examples of about 524,288 fit \(every layer"):
        take(monkeypatch, engine)
    # What is short by less than what is never planned for may yet fit.
    needed = 600 * LONG + PIECE_BYTES
    assert fit(monkeypatch, free=0.899 * needed).longest_fit == int((0.899 * needed - PIECE_BYTES) / 600)
    for free in (0.901 * needed, needed):
        take(monkeypatch, fit(monkeypatch, free=free))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [(3, 0, 16384), (3, 8192, 16384), (3, 8192, 8192), (3, 8192, 4096)]),
        ("olmoe", [(3, 0, 16384), (3, 0, 8192), (3, 0, 4096)]),
    ],
)
def test_a_shortage_brings_pieces_before_smaller_passes(family: str, expected: list[tuple[int, int, int]]) -> None:
    engine = replace(make_engine(family), tokens_per_forward=16384)
    found = []
    while (smaller := engine.shrink()) is not None:
        found.append((smaller.num_recomputed, smaller.piece_tokens, smaller.tokens_per_forward))
        engine = smaller
    assert found[: len(expected)] == expected
    assert found[-1][2] == 512


def test_passes_within_a_piece_are_only_made_smaller() -> None:
    engine, found = make_engine(), []
    while (smaller := engine.shrink()) is not None:
        found.append((smaller.num_recomputed, smaller.piece_tokens, smaller.tokens_per_forward))
        engine = smaller
    assert found == [(3, 0, 2048), (3, 0, 1024), (3, 0, 512)]
