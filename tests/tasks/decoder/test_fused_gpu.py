"""The fused decoder on a GPU: Triton kernels, FlashAttention, float8, and what fits into the memory."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.config import TrainingConfig
from tasks.decoder.attention import Segments, attend_one_by_one, find_attentions
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.elementwise import Heads
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.memory_fit import fit_memory
from tasks.training.loop import train_adapter
from tasks.training.lora import collect_trained
from tests.tasks.decoder.kernel_device import assert_same, draw, load_kernels
from tests.tasks.decoder.small_models import (
    EXPERTS,
    FAMILIES,
    LIMITS,
    build,
    compute_fused,
    compute_reference,
    draw_table,
    measure_difference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return load_kernels()


@pytest.mark.parametrize(
    ("heads", "window"), [(Heads(14, 2, 128), None), (Heads(4, 1, 256), 100), (Heads(4, 4, 64), 7)]
)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_every_attention_is_the_exact_one(heads: Heads, window: int | None, has_sinks: bool) -> None:
    lengths = (1, 300, 2048, 5, 129, *(range(1, 290) if window is None else ()))
    borders = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cuda")
    segments = Segments(borders, lengths)
    counts = (heads.num_query, heads.num_key_value, heads.num_key_value)
    inputs = [draw(sum(lengths), count, heads.size).requires_grad_() for count in counts]
    grad = draw(sum(lengths), heads.num_query, heads.size)
    options: dict[str, Any] = {"scale": heads.size**-0.5, "window": window}
    if has_sinks:
        options["sinks"] = torch.arange(heads.num_query, device="cuda") * 0.5 - 2.0  # exact in 16 bits
    doubles = [states.detach().double().requires_grad_() for states in inputs]
    exact = attend_one_by_one(doubles[0], doubles[1], doubles[2], segments, **options)
    exact_grads = torch.autograd.grad(exact, doubles, grad.double())
    for kind in find_attentions(torch.device("cuda"), torch.bfloat16, heads.size):
        result = kind(inputs[0], inputs[1], inputs[2], segments, **options)
        assert_same(result, exact.to(result.dtype), 0.02)
        for given, wanted in zip(torch.autograd.grad(result, inputs, grad), exact_grads, strict=True):
            assert measure_difference(given, wanted) < 0.01


def test_quantized_rows_keep_an_outlier_to_themselves(kernels: ModuleType) -> None:
    values = draw(64, 1000)
    values[3, 5], values[7] = 1e4, 0.0
    quantized, scales = kernels.quantize_rows(values)
    restored = quantized.float() * scales
    assert torch.isfinite(restored).all()
    others = [row for row in range(64) if row not in (3, 7)]
    assert_same(restored[others], values[others], 0.04)
    assert not restored[7].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_is_the_references(family: str) -> None:
    table = draw_table()
    model = build(family, torch.float32, "cuda")
    loss, grads = compute_reference(model, table)
    for recomputed in (0, 3):
        fused_loss, fused_grads = compute_fused(model, form_flat_batch(table, range(5)), recomputed=recomputed)
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert measure_difference(fused_grads, grads) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_to_64_bits_as_the_model_itself(family: str) -> None:
    table = draw_table()
    _, exact = compute_reference(build(family, torch.float64), table)
    model = build(family, torch.bfloat16, "cuda")
    _, general = compute_reference(model, table)
    for recomputed in (0, 3):
        _, fused = compute_fused(model, form_flat_batch(table, range(5)), recomputed=recomputed)
        if family in EXPERTS:  # as on a CPU
            limit = LIMITS.get(family, 0.1)
            assert max(measure_difference(found.cpu(), exact) for found in (fused, general)) < limit
            continue
        assert (
            measure_difference(fused.cpu(), exact)
            < 1.25 * measure_difference(general.cpu(), exact)
            < LIMITS.get(family, 0.1)
        )


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LIMITS])
def test_fp8_is_near(family: str) -> None:
    table = draw_table()
    loss, exact = compute_reference(build(family, torch.float64), table)
    for recomputed in (0, 3):
        model = build(family, torch.bfloat16, "cuda")
        fused_loss, fused = compute_fused(model, form_flat_batch(table, range(5)), recomputed=recomputed, fp8=True)
        assert fused_loss == pytest.approx(loss, rel=0.02)
        # Three bits of mantissa, in matrices of 64 columns; a lost scale or norm would make it about one.
        assert measure_difference(fused.cpu(), exact) < 0.3


@pytest.mark.parametrize(("lengths", "untrained"), [((5,), ()), ((64,), ()), ((5, 9), (0, 1)), ((1500, 3), ())])
@pytest.mark.parametrize("fp8", [False, True])
def test_odd_packs_give_numbers(lengths: tuple[int, ...], untrained: tuple[int, ...], fp8: bool) -> None:
    table = draw_table(lengths, untrained=untrained)
    loss, grads = compute_fused(
        build("qwen3", torch.bfloat16, "cuda"), form_flat_batch(table, range(len(lengths))), fp8=fp8
    )
    assert loss == loss
    assert torch.isfinite(grads).all()
    assert bool(grads.any()) == (len(untrained) < len(lengths))


def test_forward_pass_fits_into_what_is_left() -> None:
    model = build("qwen3", torch.bfloat16, "cuda")
    engine = FusedEngine(recognize_decoder(model), torch.device("cuda"), 2048, 0, LOGITS_BYTES, 2048)
    trained = list(collect_trained(model).values())
    free, _ = torch.cuda.mem_get_info()
    roomy = fit_memory(engine, trained=trained, most_tokens=4096, recompute=None)
    assert (roomy.tokens_per_forward, roomy.num_recomputed) == (4096, 0)
    left = 2 * LOGITS_BYTES
    tight = fit_memory(
        engine, trained=trained, most_tokens=1 << 20, recompute=None, reserved_bytes=int(0.9 * free) - left
    )
    assert tight.tokens_per_forward < 1 << 20
    table = draw_table([256] * (tight.tokens_per_forward // 256))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tight.sum_losses(form_flat_batch(table, range(len(table.example_ids)))).backward()
    assert torch.cuda.max_memory_allocated() - before < left


@pytest.mark.parametrize(("family", "weights"), [("qwen3", "full"), ("qwen3", "fp8"), ("qwen3_moe", "fp8")])
def test_training_learns_and_goes_on(tmp_path: Path, family: str, weights: Any) -> None:
    from tests.tasks.training.conftest import write_tokens

    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=128, max_position_embeddings=128,
        **({"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48} if family == "qwen3_moe" else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokens = write_tokens(tmp_path / "tokens")
    settings = {"rank": 16, "num_epochs": 30, "learning_rate": 5e-3, "base_weights": weights, "engine": "fused"}
    records: list[float] = []
    outcome = train_adapter(
        tmp_path / "model", tokens, tmp_path / "run", TrainingConfig(**settings), seed=0, identity="a",
        on_step=lambda record: records.append(record.loss),
    )  # fmt: skip
    assert outcome.final_loss < 0.8 * records[0]
    assert outcome.peak_memory_bytes > 0
