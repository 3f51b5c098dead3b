"""On a GPU: what a token of a long example takes in pieces and with inputs in the host's memory, and what it costs."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.host_inputs import HostMemory
from tasks.decoder.pieces import PIECE_TOKENS
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import Batch, form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.memory_fit import fit_memory
from tests.gpu.long_examples import build_engine, make_batch, measure, run_pass
from tests.tasks.decoder.small_models import build, draw_table, measure_difference, take_grads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOKENS = 65536
ROW = 2 * 4096
"""Bytes of a token in a layer's input, of the 8B shape."""
LAYERS = 12


@cache
def make_engine() -> tuple[FusedEngine, torch.Tensor]:
    return build_engine("llama3-8b", LAYERS)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch(TOKENS)


def assert_same(found: torch.Tensor, first: torch.Tensor, again: torch.Tensor) -> None:
    """Bit for bit, where the pass itself repeats so; FlashAttention's backward pass may add in any order."""
    if torch.equal(first, again):
        assert torch.equal(found, first)
    else:
        assert measure_difference(found, first) < 4 * measure_difference(again, first)


def test_pieces_spare_what_is_wide_in_a_gated_layer(batch: Batch) -> None:
    engine, grads = make_engine()
    whole, pieces = (measure(engine, batch, grads, way) for way in ("whole", "pieces"))
    # Gate and up and their gradient: 2 x 2 x 14,336 values of two bytes, of which attention's work takes the place.
    assert whole.peak_bytes - pieces.peak_bytes > TOKENS * 50_000
    assert pieces.peak_bytes < TOKENS * (LAYERS * ROW + 125_000) + PIECE_TOKENS * 175_000 + (1 << 29)
    assert measure_difference(pieces.grads, whole.grads) < 5e-3
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-4)
    assert pieces.seconds < 1.05 * whole.seconds


@pytest.mark.parametrize("way", ["host", "pieces and host"])
def test_inputs_in_the_hosts_memory_change_no_bit_and_cost_no_time(batch: Batch, way: str) -> None:
    engine, grads = make_engine()
    without, again = (measure(engine, batch, grads, "whole" if way == "host" else "pieces") for _ in range(2))
    found = measure(engine, batch, grads, way)
    assert found.loss == without.loss
    assert_same(found.grads, without.grads, again.grads)
    # The last layer's input and one more are left.
    assert without.peak_bytes - found.peak_bytes > 0.9 * TOKENS * (LAYERS - 2) * ROW
    assert found.host_bytes == (LAYERS - 1) * TOKENS * ROW
    assert found.seconds < 1.05 * without.seconds


def test_copies_keep_up_with_passes_of_many_lengths() -> None:
    """A wrong order of copies and work would give other numbers sooner or later."""
    model = build("qwen3", torch.bfloat16, "cuda", rank=16, dropout=0.1)
    decoder = recognize_decoder(model)
    engine = FusedEngine(decoder, torch.device("cuda"), 8192, len(decoder.layers), LOGITS_BYTES, 8192)
    host = replace(engine, host=HostMemory(engine.device), num_in_host=len(decoder.layers) - 1)
    for number in range(30):
        lengths = [1 + (number * 977) % 5000, 7, 300]
        batch = replace(form_flat_batch(draw_table(lengths), range(3)), dropout_key=number)
        found = []
        for each in (engine, host, engine):
            loss = each.sum_losses(batch)
            loss.backward()
            found.append((float(loss.detach()), take_grads(model)))
        assert found[0][0] == found[1][0]
        assert_same(found[1][1], found[0][1], found[2][1])


def test_what_is_chosen_fits(batch: Batch) -> None:
    """Room for each of three ways in turn, by what each was measured to take: that one is chosen, and stays within."""
    engine, grads = build_engine("llama3-8b", LAYERS, binds=False)
    ways = ("whole", "pieces", "pieces and host")
    rooms = [measure(engine, batch, grads, way, warms_up=False).peak_bytes + (5 << 29) for way in ways]
    assert rooms[0] - rooms[1] > 3 << 30
    assert rooms[1] - rooms[2] > 3 << 30
    found = []
    for room in rooms:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        fitted = fit_memory(
            replace(engine, num_recomputed=0), trained=[], most_tokens=TOKENS, recompute=True, longest_pass=TOKENS,
            reserved_bytes=int(0.9 * free) - room,
        )  # fmt: skip
        found.append((fitted.piece_tokens > 0, fitted.num_in_host > 0, fitted.longest_fit))
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_pass(fitted, batch, grads)
        assert torch.cuda.max_memory_allocated() - before < room
    assert found == [(False, False, 0), (True, False, 0), (True, True, 0)]
