"""The Triton kernels of experts in float8 against plain PyTorch: on a GPU, or in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.decoder import expert_elementwise, expert_float8
from tasks.decoder.expert_elementwise import Gate
from tasks.decoder.expert_float8 import make_copy_room
from tasks.decoder.grouped import ExpertPart, build_grouped_projection
from tasks.decoder.quantized_experts import quantize_experts
from tests.tasks.decoder.kernel_device import DEVICE, DTYPES, IS_INTERPRETED, assert_same, draw, needs_kernels, rooms

pytestmark = needs_kernels
# Two experts without rows, one with one, and some with more than a tile.
COUNTS = (21, 0, 1, 18, 0) if IS_INTERPRETED else (130, 0, 1, 300, 0)
ENDS = torch.tensor(COUNTS).cumsum(0).to(torch.int32).to(DEVICE)
NUM_ROWS, NUM_EXPERTS = sum(COUNTS), len(COUNTS)
TOKENS = torch.arange(NUM_ROWS).mul(7).remainder(NUM_ROWS // 2).to(DEVICE)
GATES = [Gate("silu"), Gate("clamped", is_interleaved=True, alpha=1.7, limit=1.1)]


@pytest.fixture(scope="module")
def kernels() -> Any:
    from tasks.decoder import expert_float8_kernels

    return expert_float8_kernels


def assert_as_quantized(found: Tensor, wanted: Tensor) -> None:
    """The same numbers but for a few that lie between two.

    Triton's interpreter loses the carry of a number that is rounded up to a power of two: these are left out there.
    """
    left, right = found.float(), wanted.float()
    if IS_INTERPRETED:
        is_power = torch.frexp(right)[0].abs() == 0.5
        left = torch.where(is_power, right, left)
        assert int(is_power.sum()) < left.numel() // 3
    assert int((left != right).sum()) <= max(1, left.numel() // 1000)
    assert bool(((left - right).abs() <= right.abs() / 8 + 2**-9).all())


@pytest.mark.parametrize("width", [24, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_in_float8(kernels: Any, width: int, dtype: torch.dtype) -> None:
    joint = draw(NUM_EXPERTS, 48, width + 8, dtype=dtype)
    joint[2, 5, 3], joint[1, 7] = 1e4, 0.0
    for weights in (joint[:, :40, :width], joint[:, :40, :width].mT):
        found, wanted = kernels.quantize_matrices(weights), expert_float8.quantize_matrices(weights)
        assert_same(found.scales, wanted.scales, 1e-6)
        assert_as_quantized(found.values, wanted.values)
        restored = wanted.values.float() * wanted.scales[..., None]
        assert float((restored - weights.float()).norm() / weights.float().norm()) < 0.04
        turned = kernels.turn_matrices(found.values)
        assert turned.is_contiguous()
        assert torch.equal(turned.float(), found.values.float().mT)


@pytest.mark.parametrize("width", [24, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_float8(kernels: Any, width: int, dtype: torch.dtype) -> None:
    rows = draw(NUM_ROWS, width + 8, dtype=dtype)[:, :width]
    rows[3] = 0.0
    factors = torch.rand(NUM_EXPERTS, width, device=DEVICE) + 0.1
    for given in ((None, ENDS), (factors, ENDS), (factors, ENDS, TOKENS)):
        found = kernels.quantize_expert_rows(rows, *given)
        wanted = expert_float8.quantize_expert_rows(rows, *given)
        assert_same(found.scales, wanted.scales, 1e-6)
        assert_as_quantized(found.values, wanted.values)


@pytest.mark.parametrize(("width", "num_outputs"), [(128, 40), (200, 136)])
@pytest.mark.parametrize("num_further", [0, 8, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_experts_in_float8(
    kernels: Any, width: int, num_outputs: int, num_further: int, dtype: torch.dtype
) -> None:
    weights = expert_float8.quantize_matrices(draw(NUM_EXPERTS, num_outputs, width, dtype=dtype))
    rows = expert_float8.quantize_expert_rows(draw(NUM_ROWS, width, dtype=dtype), None, ENDS)
    small = draw(NUM_ROWS, num_further, dtype=dtype)
    further = draw(NUM_EXPERTS, num_outputs, num_further, dtype=dtype)
    turned = draw(NUM_EXPERTS, num_further, num_outputs, dtype=dtype).mT
    tiles = {"tiles": kernels.Tiles(16, 32, 32, 4, 1)} if IS_INTERPRETED else {}
    for scales, columns, tokens in ((weights.scales, further, None), (None, turned, TOKENS)):
        given = rows, weights.values, scales, small, columns, ENDS, tokens
        found = kernels.multiply_quantized(*given, **tiles)
        assert found.dtype == dtype
        assert found.shape == (NUM_ROWS, num_outputs)
        assert_same(found, expert_float8.multiply_quantized(*given), 1e-5 if IS_INTERPRETED else 4e-3)


@pytest.mark.parametrize(("width", "num_outputs"), [(40, 8), (200, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_products_of_gathered_rows(kernels: Any, width: int, num_outputs: int, dtype: torch.dtype) -> None:
    values = draw(NUM_ROWS // 2, width, dtype=dtype)
    matrices = draw(NUM_EXPERTS, num_outputs, width, dtype=dtype)
    for given in (matrices, matrices.mT.contiguous().mT):
        found = kernels.project_rows(values, TOKENS, given, ENDS)
        wanted = expert_float8.project_rows(values, TOKENS, given, ENDS)
        assert found.shape == (NUM_ROWS, num_outputs)
        assert_same(found, wanted, 1e-5 if IS_INTERPRETED else 4e-3)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.activation)
@pytest.mark.parametrize("width", [40, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_leave_a_float8_copy_of_what_they_write(kernels: Any, gate: Gate, width: int, dtype: torch.dtype) -> None:
    from tasks.decoder import expert_kernels

    gate_up, grad = draw(NUM_ROWS, 2 * width, dtype=dtype), draw(NUM_ROWS, width, dtype=dtype)
    weights = torch.rand(NUM_ROWS, device=DEVICE).to(dtype)
    copy = make_copy_room(gate_up, NUM_ROWS, width, None, ENDS)
    (left, plain), again = rooms(NUM_ROWS, width, dtype=dtype), grad.clone()
    expert_kernels.gate_weighted(gate_up, weights, gate, left, copy)
    expert_kernels.gate_weighted(gate_up, weights, gate, plain)
    assert torch.equal(left, plain)
    wanted = kernels.quantize_expert_rows(left, None, ENDS)
    assert torch.equal(copy.values.float(), wanted.values.float())
    assert torch.equal(copy.scales, wanted.scales)
    factors = torch.rand(NUM_EXPERTS, 2 * width, device=DEVICE) + 0.1
    copy = make_copy_room(gate_up, NUM_ROWS, 2 * width, factors, ENDS)
    left, plain = rooms(NUM_ROWS, 2 * width, dtype=dtype)
    of_weights = expert_kernels.gate_weighted_backward(grad, gate_up, weights, gate, left, copy)
    assert_same(of_weights, expert_kernels.gate_weighted_backward(again, gate_up, weights, gate, plain), 1e-6)
    assert torch.equal(left, plain)
    assert torch.equal(grad, again)
    wanted = kernels.quantize_expert_rows(left, factors, ENDS)
    assert torch.equal(copy.values.float(), wanted.values.float())
    assert torch.equal(copy.scales, wanted.scales)


@pytest.mark.skipif(IS_INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize(("num_experts", "hidden", "intermediate"), [(128, 2048, 768), (32, 2880, 2880)])
def test_experts_of_real_sizes(num_experts: int, hidden: int, intermediate: int) -> None:
    """Against the same rows and matrices in 16 bits: what three bits of mantissa cost, and no more."""
    tokens, num_outputs = torch.arange(1 << 14, device=DEVICE) // 2, 2 * intermediate
    rows, grad = (draw(1 << 13, width, dtype=torch.bfloat16) for width in (hidden, num_outputs))
    ends = torch.rand(num_experts, device=DEVICE).cumsum(0)
    ends = (ends / ends[-1] * len(tokens)).round().to(torch.int32)
    weight = nn.Parameter(0.02 * draw(num_experts, 2 * intermediate, hidden, dtype=torch.bfloat16), requires_grad=False)
    lora_a = nn.Parameter(0.02 * draw(num_experts * 16, hidden, dtype=torch.float32))
    lora_b = nn.Parameter(0.02 * draw(2 * intermediate, 16 * num_experts, dtype=torch.float32))
    bias = draw(num_experts, 2 * intermediate, dtype=torch.bfloat16)
    full, given = (build_grouped_projection(ExpertPart(weight, bias, lora_a, lora_b, 2.0)) for _ in range(2))
    quantized = quantize_experts(given)
    sides = []
    for projection in (full, quantized):
        projection.adapters.copy()
        outputs, small = projection.forward_tokens(rows, tokens, ends, expert_elementwise)
        sides.append((outputs, small, *projection.backward_tokens(grad, tokens, ends, expert_elementwise)))
    for found, wanted in zip(sides[1], sides[0], strict=True):
        assert_same(found, wanted, 0.06)
