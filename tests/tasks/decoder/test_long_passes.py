"""Passes of long examples: gated layers in pieces of tokens, and layers' inputs in the host's memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.decoder import elementwise, host_inputs
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.divided import DividedLayers
from tasks.decoder.float8 import quantize_decoder
from tasks.decoder.host_inputs import HostMemory
from tasks.decoder.passing_copies import pass_copies
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import Batch, form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tests.tasks.decoder import test_own_weights as own_weights
from tests.tasks.decoder.plain_float8 import build_operations, load_quantized, quantize_rows
from tests.tasks.decoder.small_models import build, draw_table, measure_difference, take_grads

CPU = torch.device("cpu")
# Of each kind: post-norms and windows, no norm before, a scale of what joins the stream, an input of each layer, a
# delta rule, routed experts alone, after a dense first layer, with shared ones, and beside a gated layer.
KINDS = [
    *("llama", "qwen3", "gemma3_text", "olmo2", "granite", "gemma4_text", "qwen3_5_text"),
    *("qwen3_moe", "deepseek_v3", "qwen2_moe", "gemma4_moe"),
]
SIZE = 7
"""Of a piece: tokens are cut within examples and at their borders, and the last piece is short."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input of 70 tokens takes several pieces of the host's memory, the last one in part."""
    monkeypatch.setattr(host_inputs, "CHUNK_BYTES", 1 << 12)


def make_engine(model: Any, **settings: Any) -> FusedEngine:
    decoder = recognize_decoder(model)
    return FusedEngine(decoder, CPU, 4096, len(decoder.layers), LOGITS_BYTES, 4096, **settings)


def in_host(engine: FusedEngine, number: int | None = None) -> FusedEngine:
    layers = engine.num_layers - 1 if number is None else number
    return replace(engine, host=HostMemory(CPU), num_in_host=layers)


def draw_batch(key: int = 3, lengths: tuple[int, ...] = (17, 1, 3, 40, 9)) -> Batch:
    return replace(form_flat_batch(draw_table(lengths), range(len(lengths))), dropout_key=key)


def compute(engine: FusedEngine, model: Any, *batches: Batch) -> tuple[float, Tensor]:
    losses = []
    for batch in batches or (draw_batch(),):
        loss = engine.sum_losses(batch)
        loss.backward()
        losses.append(float(loss.detach()))
    return sum(losses), take_grads(model)


def drop(family: str) -> dict[str, Any]:
    return {} if family in ("gpt_oss", "gemma4_moe") else {"dropout": 0.25}


@pytest.mark.parametrize("family", KINDS)
def test_pieces_add_up_to_the_whole(family: str) -> None:
    model = build(family, torch.float64, **drop(family))
    engine = make_engine(model)
    batches = draw_batch(3), draw_batch(4, (30, 2, 11))  # a step of two passes
    loss, grads = compute(engine, model, *batches)
    found_loss, found = compute(replace(engine, piece_tokens=SIZE), model, *batches)
    assert found_loss == pytest.approx(loss, rel=1e-14)
    assert measure_difference(found, grads) < 1e-13


def test_a_piece_that_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float64)
    engine = make_engine(model, piece_tokens=SIZE)
    _, grads = compute(engine, model)
    seen: list[int] = []
    plain = elementwise.gate_backward

    def lose(grad: Tensor, *arguments: Any) -> None:
        seen.append(len(grad))
        plain(grad.zero_() if len(seen) == 2 else grad, *arguments)

    monkeypatch.setattr(elementwise, "gate_backward", lose)
    assert measure_difference(compute(engine, model)[1], grads) > 1e-3
    # Padding makes 128 tokens of 70; the last layer runs at the trained ones alone.
    trained = len(draw_batch().trained)  # type: ignore[arg-type]
    assert max(seen) == SIZE
    assert sum(seen) == 2 * draw_batch().input_ids.numel() + trained


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_piece_is_wider_than_asked_for(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = build(family, torch.float32)
    engine = make_engine(model, piece_tokens=SIZE)
    rows: list[int] = []
    plain = elementwise.gate

    def gate(gate_up: Tensor, *arguments: Any) -> None:
        rows.append(len(gate_up))
        plain(gate_up, *arguments)

    monkeypatch.setattr(elementwise, "gate", gate)
    compute(engine, model)
    tokens, trained = draw_batch().input_ids.numel(), len(draw_batch().trained)  # type: ignore[arg-type]
    assert max(rows) == SIZE
    assert sum(rows) == 2 * (2 * tokens + trained)  # forward, and again for the gradient: no third time


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("size", [0, SIZE])
def test_inputs_in_the_hosts_memory_change_no_bit(family: str, size: int) -> None:
    model = build(family, torch.bfloat16, **drop(family))
    engine = make_engine(model, piece_tokens=size)
    batches = draw_batch(3), draw_batch(4, (30, 2, 11))
    loss, grads = compute(engine, model, *batches)
    for number in (1, 2):
        other = in_host(engine, number)
        for _ in range(2):  # in the memory that the first passes have left
            found_loss, found = compute(other, model, *batches)
            assert found_loss == loss
            assert torch.equal(found, grads)
        assert other.host is not None
        assert other.host.num_chunks == len(other.host._free) > number


def test_bound_gradients_are_added_to_piece_by_piece() -> None:
    model = build("qwen3", torch.float32)
    _, wanted = compute(make_engine(model), model, draw_batch(3), draw_batch(4))
    engine = in_host(make_engine(model, piece_tokens=SIZE))
    flat = engine.bind_gradients()
    assert flat is not None
    for batch in (draw_batch(3), draw_batch(4)):
        engine.sum_losses(batch).backward()
    assert float(flat.norm()) == pytest.approx(float(wanted.norm()), rel=1e-6)
    assert measure_difference(take_grads(model), wanted) < 1e-6


@pytest.mark.parametrize("modules", [("gate_proj", "up_proj", "down_proj"), ("down_proj",), ("q_proj",)])
def test_adapters_on_some_layers_alone(modules: tuple[str, ...]) -> None:
    model = build("llama", torch.float64, target_modules=modules)
    engine = make_engine(model)
    loss, grads = compute(engine, model)
    found_loss, found = compute(in_host(replace(engine, piece_tokens=SIZE)), model)
    assert found_loss == pytest.approx(loss, rel=1e-14)
    assert measure_difference(found, grads) < 1e-13


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("is_bound", [False, True])
@pytest.mark.parametrize("passes", [False, True])
def test_own_weights(family: str, is_bound: bool, passes: bool) -> None:
    dtype = torch.bfloat16 if passes else torch.float32
    model = own_weights.build(family, torch.float32)
    engine = own_weights.recognize(model, dtype)
    engine = replace(engine, num_recomputed=engine.num_layers)
    if is_bound:
        assert engine.bind_gradients() is not None
    batch = draw_batch()
    engine.sum_losses(batch).backward()
    wanted = own_weights.take_grads(model)
    if passes:
        passing = pass_copies(engine.decoder)
        assert passing is not None
        engine = replace(engine, decoder=replace(engine.decoder, divided=passing))
    in_host(replace(engine, piece_tokens=SIZE)).sum_losses(batch).backward()
    whole, single = own_weights.compare(own_weights.take_grads(model), wanted)
    assert whole < (1e-2 if passes else 1e-6)
    assert max(single.values()) < (5e-2 if passes else 1e-5)


def test_frozen_weights_divided_among_ranks() -> None:
    model = build("llama", torch.float64, dropout=0.25)
    loss, grads = compute(make_engine(model), model)
    model = build("llama", torch.float64, dropout=0.25)
    decoder = recognize_decoder(model, divided=DividedLayers(CPU))
    engine = FusedEngine(decoder, CPU, 4096, 3, LOGITS_BYTES, 4096, piece_tokens=SIZE)
    for _ in range(2):
        found_loss, found = compute(in_host(engine), model)
        assert found_loss == pytest.approx(loss, rel=1e-14)
        assert measure_difference(found, grads) < 1e-13


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_frozen_weights_in_8_bits(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(load_quantized(), "quantize_rows", quantize_rows)
    model = build(family, torch.bfloat16, dropout=0.25)
    decoder = replace(quantize_decoder(recognize_decoder(model)), ops=build_operations())
    engine = FusedEngine(decoder, CPU, 4096, 3, LOGITS_BYTES, 4096)
    loss, grads = compute(engine, model)
    found_loss, found = compute(in_host(replace(engine, piece_tokens=SIZE)), model)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert measure_difference(found, grads) < 1e-2  # each row has its own scale: only bf16's additions differ
    missing = draw_batch(3, (17, 1, 3, 40))
    assert measure_difference(compute(engine, model, missing)[1], grads) > 0.1


def test_passes_may_begin_before_others_have_ended() -> None:
    model = build("llama", torch.float32, dropout=0.0)
    engine = make_engine(model)
    loss, grads = compute(engine, model, draw_batch(), draw_batch(4, (30, 2, 11)))
    engine = in_host(engine)
    first = engine.sum_losses(draw_batch())
    second = engine.sum_losses(draw_batch(4, (30, 2, 11)))
    (first + second).backward()
    assert float(first.detach()) + float(second.detach()) == loss
    assert measure_difference(take_grads(model), grads) < 1e-6


def test_a_pass_without_a_backward_pass_leaves_its_memory_to_others() -> None:
    model = build("llama", torch.float32)
    engine = in_host(make_engine(model))
    assert engine.host is not None
    loss = engine.sum_losses(draw_batch())
    held = engine.host.num_chunks
    assert held > 0
    assert not engine.host._free
    del loss
    assert len(engine.host._free) == held
    compute(engine, model)
    with torch.no_grad():
        engine.sum_losses(draw_batch())
    assert engine.host.num_chunks == len(engine.host._free) == held
