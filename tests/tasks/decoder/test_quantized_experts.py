"""Routed experts in float8, in plain PyTorch: whole numbers exactly, and decoders with them near to 64 bits."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.decoder import expert_elementwise
from tasks.decoder.decoder import LOGITS_BYTES, Decoder
from tasks.decoder.expert_float8 import fill_copy
from tasks.decoder.float8 import count_unquantized
from tasks.decoder.grouped import ExpertPart, GroupedProjection, build_grouped_projection
from tasks.decoder.quantized_experts import QuantizedExperts, quantize_experts
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tests.tasks.decoder.small_models import (
    EXPERTS,
    LIMITS,
    build,
    compute_reference,
    draw_table,
    measure_difference,
    name_attention_modules,
    take_grads,
)

NUM_EXPERTS, NUM_IN, NUM_OUT, RANK = 3, 16, 24, 5
ENDS = torch.tensor([2, 2, 7], dtype=torch.int32)  # the second expert has no row
TOKENS = torch.arange(7).flip(0)
ROW_WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.0, 4.0, 0.0])


def draw_whole(*shape: int) -> Tensor:
    """Whole numbers that float8 holds; the first of each row is its largest number, so that a scale is one."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randint(-15, 16, shape, generator=generator).float()
    values[..., 0] = 448.0
    return values


def make_part(*, has_bias: bool, has_adapter: bool) -> ExpertPart:
    """Matrices whose rows are whole numbers times a power of two, another one for each row."""
    powers = 2.0 ** (torch.arange(NUM_EXPERTS * NUM_OUT).view(NUM_EXPERTS, NUM_OUT, 1) % 7 - 3)
    weight = nn.Parameter(draw_whole(NUM_EXPERTS, NUM_OUT, NUM_IN) * powers, requires_grad=False)
    bias = draw_whole(NUM_EXPERTS, NUM_OUT) if has_bias else None
    if not has_adapter:
        return ExpertPart(weight, bias, None, None, 0.0)
    lora_a, lora_b = (
        nn.Parameter(draw_whole(*shape).remainder(3) - 1)
        for shape in ((NUM_EXPERTS * RANK, NUM_IN), (NUM_OUT, RANK * NUM_EXPERTS))
    )
    return ExpertPart(weight, bias, lora_a, lora_b, 2.0)


def build_both(**kind: bool) -> tuple[GroupedProjection, QuantizedExperts]:
    """The same projection in fp32 and in float8."""
    full, given = (build_grouped_projection(make_part(**kind)) for _ in range(2))
    quantized = quantize_experts(given)
    assert not given.matrices.numel()
    assert given.adapters.part.weight.untyped_storage().nbytes() <= 8
    full.adapters.copy()
    quantized.adapters.copy()
    return full, quantized


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_numbers_that_float8_holds_are_multiplied_exactly(has_bias: bool, has_adapter: bool) -> None:
    rows, sides = draw_whole(7, NUM_IN), []
    for projection in build_both(has_bias=has_bias, has_adapter=has_adapter):
        room = projection.allocate_input(7, ENDS)
        room.values.copy_(rows)
        fill_copy(room.float8, rows)
        small = projection.project_small(room, ENDS, ROW_WEIGHTS)
        of_tokens = projection.forward_tokens(rows.flip(0), TOKENS, ENDS, expert_elementwise, ROW_WEIGHTS)
        sides.append((projection.forward(room, small, ENDS), small.clone(), *of_tokens))
    for found, wanted in zip(sides[1], sides[0], strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(sides[0][0], sides[0][2])
    assert sides[0][0].shape == (7, NUM_OUT)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_gradients_that_float8_holds_are_multiplied_exactly(has_bias: bool, has_adapter: bool) -> None:
    full, quantized = build_both(has_bias=has_bias, has_adapter=has_adapter)
    # With its scale each column is a whole number, and the first the largest.
    scales = quantized.weight.scales.repeat_interleave(torch.diff(ENDS, prepend=ENDS.new_zeros(1)), 0)
    grads, sides = draw_whole(7, NUM_OUT) / scales, []
    for projection in (full, quantized):
        room = projection.allocate_grad(7, ENDS)
        room.values.copy_(grads)
        fill_copy(room.float8, grads)
        small, result = projection.backward(room, ENDS, needs_input=True)
        assert projection.backward(room, ENDS, needs_input=False)[1] is None
        assert result is not None
        sides.append(
            (small.clone(), result, *projection.backward_tokens(grads.flip(0), TOKENS, ENDS, expert_elementwise))
        )
    for found, wanted in zip(sides[1], sides[0], strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(sides[0][1], sides[0][3])
    assert sides[0][1].shape == (7, NUM_IN)


def test_a_matrix_takes_a_byte_a_number_and_a_scale_a_row() -> None:
    _, quantized = build_both(has_bias=False, has_adapter=False)
    tensors = (*quantized.weight, quantized.inner, quantized.outer)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert num_bytes == NUM_EXPERTS * NUM_OUT * (NUM_IN + 4)


def test_an_outlier_costs_other_rows_no_precision() -> None:
    part = make_part(has_bias=False, has_adapter=False)
    part.weight.data = torch.randn(NUM_EXPERTS, NUM_OUT, NUM_IN)
    part.weight.data[1, 4, 2] = 1e4
    wanted = part.weight.data.clone()
    weight = quantize_experts(build_grouped_projection(part)).weight
    errors = (weight.values.float() * weight.scales[..., None] - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(errors.max()) < 0.06


def quantize_all_experts(decoder: Decoder) -> Decoder:
    """Return a decoder with the routed experts alone in float8: the others' products are for a GPU."""
    layers = []
    for layer in decoder.layers:
        experts: Any = layer.experts
        if experts is not None:
            experts = replace(experts, gate_up=quantize_experts(experts.gate_up), down=quantize_experts(experts.down))
        layers.append(replace(layer, experts=experts))
    quantized = replace(decoder, layers=tuple(layers))
    quantized.refresh()
    return quantized


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("is_adapted", [True, False])
def test_decoders_with_experts_in_float8_are_near_to_64_bits(family: str, is_adapted: bool) -> None:
    table = draw_table()
    settings: dict[str, Any] = {} if is_adapted else {"target_modules": name_attention_modules(family)}
    loss, exact = compute_reference(build(family, torch.float64, **settings), table)
    found = []
    for recomputed in (0, 3):
        model = build(family, torch.float32, **settings)
        decoder = quantize_all_experts(recognize_decoder(model))
        engine = FusedEngine(decoder, torch.device("cpu"), 4096, recomputed, LOGITS_BYTES, 4096)
        total = engine.sum_losses(form_flat_batch(table, range(5)))
        total.backward()
        found.append(take_grads(model))
        assert float(total.detach()) == pytest.approx(loss, rel=0.005)
        # Three bits of mantissa in rows of 24 to 96 numbers. FlexOlmo has a norm after its experts: in 64 bits, such
        # errors of the experts' weights alone change its gradients by 0.21 to 0.25.
        assert 1e-4 < measure_difference(found[-1], exact) < {**LIMITS, "flex_olmo": 0.25}.get(family, 0.15)
    assert torch.equal(found[0], found[1])


def test_gradients_of_experts_in_float8_are_added_in_place() -> None:
    table, sides = draw_table(), []
    for is_bound in (False, True):
        model = build("gpt_oss", torch.float32)
        decoder = quantize_all_experts(recognize_decoder(model))
        engine = FusedEngine(decoder, torch.device("cpu"), 4096, 0, LOGITS_BYTES, 4096)
        if is_bound:
            assert engine.bind_gradients() is not None
        engine.sum_losses(form_flat_batch(table, range(5))).backward()
        sides.append(take_grads(model))
    torch.testing.assert_close(sides[0], sides[1], rtol=1e-5, atol=1e-7)


def test_experts_count_among_the_products_in_float8() -> None:
    decoder = recognize_decoder(build("qwen3_moe", torch.float32))
    num_kept, num_products = count_unquantized(decoder)
    assert num_kept == num_products
    # Two layers have a pair of routed products each, and the one between them a gated layer's pair.
    assert num_products == 3 * 2 + 2 * 2 + 2
    assert count_unquantized(quantize_all_experts(decoder)) == (num_products - 4, num_products)


def test_nothing_is_read_before_it_is_written() -> None:
    """PyTorch fills new memory with NaN here."""
    model = build("gpt_oss", torch.bfloat16)
    decoder = quantize_all_experts(recognize_decoder(model))
    engine = FusedEngine(decoder, torch.device("cpu"), 4096, 1, LOGITS_BYTES, 4096)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loss = engine.sum_losses(form_flat_batch(draw_table(), range(5)))
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert math.isfinite(loss.item())
    assert take_grads(model).isfinite().all()
