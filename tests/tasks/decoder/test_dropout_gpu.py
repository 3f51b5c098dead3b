"""Dropout in the Triton kernels: the masks bit by bit, the fused engine's gradient under them, and what they cost."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.config import TrainingConfig
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.dropout import Dropout, MaskedTensor, derive_key, draw_kept
from tasks.decoder.float8 import quantize_decoder
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.self_check import try_model, verify
from tasks.training.lora import attach_adapter
from tests.tasks.decoder.kernel_device import assert_masked, draw, load_kernels, make
from tests.tasks.decoder.small_models import FAMILIES, build, compute_fused, draw_table, measure_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
# The masks of these sites take every way in which Triton could specialize a kernel for its arguments.
SITES = [0, 1, 16, 107]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return load_kernels()


def test_rows_beyond_32_bits_of_offset(kernels: ModuleType) -> None:
    """The last rows of a tensor of 2^31 and more elements are masked by their own numbers."""
    rows, width = (1 << 31) // 4096 + 64, 4096
    values, mask = torch.ones(rows, width, device="cuda", dtype=torch.bfloat16), make(0.5, 5)
    kernels.drop(values, MaskedTensor(values, mask))
    kept = draw_kept(mask, torch.arange(rows - 64, rows, device="cuda"), width)
    assert torch.equal(values[-64:] != 0, kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_the_plain_engines_under_the_same_key(family: str) -> None:
    """Which the model itself gives under the same masks: see test_dropout."""
    batch = replace(form_flat_batch(draw_table(), range(5)), dropout_key=derive_key(1, 2, 3))
    loss, grads = compute_fused(build(family, torch.float32, dropout=0.2), batch)
    _, rounded = compute_fused(build(family, torch.bfloat16, dropout=0.2), batch)
    # In 16 bits a small model's router sends tokens to other experts, on a CPU, too.
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, max(0.1, 1.5 * measure_difference(rounded, grads)))):
        for recomputed in (0, 3):
            model = build(family, dtype, "cuda", dropout=0.2)
            fused_loss, fused = compute_fused(model, batch, recomputed=recomputed)
            assert fused_loss == pytest.approx(loss, rel=1e-5 if dtype == torch.float32 else 0.02)
            assert measure_difference(fused.cpu(), grads) < limit


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_costs_fp8_little_precision(family: str) -> None:
    """How far FP8 is from 32 bits depends on the family (three bits of mantissa); masks must not change that much."""
    errors = {}
    for p in (0.0, 0.2):
        batch = replace(form_flat_batch(draw_table(), range(5)), dropout_key=derive_key(1, 2, 3))
        loss, grads = compute_fused(build(family, torch.float32, dropout=p), batch)
        fused_loss, fused = compute_fused(build(family, torch.bfloat16, "cuda", dropout=p), batch, fp8=True)
        assert fused_loss == pytest.approx(loss, rel=0.02)
        errors[p] = measure_difference(fused.cpu(), grads)
    assert errors[0.2] < 1.5 * errors[0.0], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trial_accepts_it_on_this_machine(dtype: torch.dtype) -> None:
    table, model = draw_table(), build("qwen2", dtype, "cuda", dropout=0.05)
    expected = try_model(model, table, CUDA, dtype)
    decoder, _ = verify(model, recognize_decoder(model), table, expected, CUDA, dtype)
    assert decoder.dropout is not None
    assert decoder.dropout.p == 0.05


def test_recorded_graph_draws_anew_by_the_key_in_its_tensor(kernels: ModuleType) -> None:
    dropout = Dropout(0.5, torch.zeros(1, dtype=torch.int64, device="cuda"))
    values, masked = draw(64, 512), torch.empty(64, 512, device="cuda", dtype=torch.bfloat16)
    kernels.drop(values, MaskedTensor(masked, dropout.mask(2)))  # compiled before it is recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.drop(values, MaskedTensor(masked, dropout.mask(2)))
    for key in (derive_key(0, 0, 0), derive_key(0, 0, 1)):
        dropout.start_forward(key)
        graph.replay()
        assert_masked(masked, values, dropout.mask(2))


def build_layers(dropout: float, num_layers: int = 4) -> FusedEngine:
    """Layers of Qwen2.5-7B's shape, almost without a head."""
    config = AutoConfig.for_model(
        "qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=num_layers, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=1024, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapted = attach_adapter(model, TrainingConfig(dropout=dropout), seed=0).to("cuda").train()
    return FusedEngine(recognize_decoder(adapted), CUDA, 1 << 20, 0, LOGITS_BYTES, 1 << 20)


def time_call(call: Callable[[], Any], *, repetitions: int = 10) -> float:
    """Median milliseconds on the GPU."""
    times = []
    for number in range(repetitions + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


@pytest.mark.parametrize("fp8", [False, True])
def test_layers_of_7b_cost_little_more(fp8: bool) -> None:
    batch = form_flat_batch(draw_table([512] * 32), range(32)).move(CUDA)
    times = {}
    for p in (0.0, 0.05):
        engine = build_layers(p)
        if fp8:
            engine = replace(engine, decoder=quantize_decoder(engine.decoder))
        torch.cuda.reset_peak_memory_stats()
        times[p] = time_call(lambda engine=engine: engine.sum_losses(batch).backward())  # type: ignore[misc]
        peak = torch.cuda.max_memory_allocated() / 2**30
        sys.stdout.write(f"\n4 layers of 7B, fp8 {fp8}, 16,384 tokens, dropout {p}: {times[p]:.2f} ms, {peak:.1f} GiB")
        del engine
        torch.cuda.empty_cache()
    sys.stdout.write(f"\nratio {times[0.05] / times[0.0]:.3f}\n")
    assert times[0.05] < (1.2 if fp8 else 1.12) * times[0.0]


def test_kernels_cost_what_their_bytes_do(kernels: ModuleType) -> None:
    """Print milliseconds and TB/s of each kernel without and with dropout, at 16,384 tokens of 7B's shape."""
    rows, hidden, wide = 16384, 3584, 18944
    mask = make(0.05, 7)
    residual, delta, grad, out, further = (draw(rows, hidden) for _ in range(5))
    weight = torch.rand(hidden, device="cuda")
    total, rstd = kernels.add_norm(residual, delta, weight, 1e-6, out)
    gate_up, to_gate = draw(rows, 2 * wide), draw(rows, 2 * wide)
    gated, gated_further = draw(rows, wide), draw(rows, wide)
    calls: dict[str, tuple[int, int, Callable[..., Any]]] = {
        "add_norm": (4, 5, partial(kernels.add_norm, residual, delta, weight, 1e-6, out, None)),
        "norm_backward": (4, 5, partial(kernels.norm_backward, grad, total, rstd, weight, delta, out, None)),
        "gate": (3, 4, partial(kernels.gate, gate_up, "silu", gated, None)),
        "gate_backward": (6, 7, partial(kernels.gate_backward, gated, gate_up, "silu", to_gate, None)),
    }
    for name, (plain, dropping, call) in calls.items():
        room, width = (further, hidden) if "norm" in name else (gated_further, wide)
        for num, masked in ((plain, None), (dropping, MaskedTensor(room, mask))):
            milliseconds = time_call(partial(call, masked))
            speed = num * 2 * rows * width / milliseconds / 1e9
            sys.stdout.write(f"\n{name}, dropout {masked is not None}: {milliseconds:.3f} ms, {speed:.2f} TB/s")
            assert speed > 1.0
    for name, num, call in (
        ("drop", 2, partial(kernels.drop, residual, MaskedTensor(further, mask))),
        ("drop_backward", 5, partial(kernels.drop_backward, grad, residual, MaskedTensor(further, mask))),
    ):
        milliseconds = time_call(call)
        sys.stdout.write(f"\n{name}: {milliseconds:.3f} ms, {num * 2 * rows * hidden / milliseconds / 1e9:.2f} TB/s\n")


def test_same_key_is_the_same_gradient_bit_by_bit() -> None:
    engine = build_layers(0.05, 1)
    batch = form_flat_batch(draw_table([64] * 8), range(8))
    # Not those of q, k and v: FlashAttention's backward pass may add in any order.
    groups = engine.decoder.layers[0].projections[1:]
    parameters = [parameter for group in groups for parameter in group.adapters.parameters]
    results = []
    for key in (5, 5, 6):
        engine.sum_losses(replace(batch, dropout_key=key)).backward()
        results.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for parameter in parameters:
            parameter.grad = None
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
