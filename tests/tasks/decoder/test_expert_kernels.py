"""The Triton kernels of routed experts against plain PyTorch: on a GPU, or in Triton's interpreter."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from tasks.decoder import expert_elementwise
from tasks.decoder.expert_elementwise import Gate
from tasks.decoder.experts import sort_rows
from tests.tasks.decoder.kernel_device import (
    DEVICE,
    DTYPES,
    IS_INTERPRETED,
    assert_same,
    draw,
    needs_kernels,
    rooms,
)

pytestmark = needs_kernels
NUM_TOKENS = 12 if IS_INTERPRETED else 700
NUM_EXPERTS = 5
GATES = [Gate("silu"), Gate("gelu_tanh"), Gate("clamped", is_interleaved=True, alpha=1.7, limit=1.1)]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from tasks.decoder import expert_kernels

    return expert_kernels


def draw_chosen() -> Tensor:
    """Three experts for each token; the last expert of all has none."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(NUM_EXPERTS - 1, generator=generator)[:3] for _ in range(NUM_TOKENS)]
    return torch.stack(rows).to(DEVICE)


@pytest.mark.parametrize("width", [40, 2880])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_go_to_their_experts_and_back(kernels: ModuleType, width: int, dtype: torch.dtype) -> None:
    order = sort_rows(draw_chosen(), NUM_EXPERTS)
    values = draw(NUM_TOKENS, width, dtype=dtype)
    left, right = rooms(3 * NUM_TOKENS, width, dtype=dtype)
    kernels.gather_rows(values, order.tokens, left)
    expert_elementwise.gather_rows(values, order.tokens, right)
    assert torch.equal(left, right)
    assert_same(kernels.sum_rows(left, order.places), expert_elementwise.sum_rows(right, order.places), 1e-6)
    # Each row back at its token: three times what went out, and each of its experts has got it.
    assert_same(kernels.sum_rows(left, order.places), 3 * values, 4e-3)
    counts = torch.bincount(draw_chosen().flatten(), minlength=NUM_EXPERTS)
    assert order.ends.tolist() == counts.cumsum(0).tolist()


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.activation)
@pytest.mark.parametrize("width", [24, 2880])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_gate_kernels(kernels: ModuleType, gate: Gate, width: int, dtype: torch.dtype) -> None:
    gate_up, grad = draw(NUM_TOKENS, 2 * width, dtype=dtype), draw(NUM_TOKENS, width, dtype=dtype)
    weights = torch.rand(NUM_TOKENS, device=DEVICE).to(dtype)
    left, right = rooms(NUM_TOKENS, width, dtype=dtype)
    kernels.gate_weighted(gate_up, weights, gate, left)
    expert_elementwise.gate_weighted(gate_up, weights, gate, right)
    assert_same(left, right)
    left, right = rooms(NUM_TOKENS, 2 * width, dtype=dtype)
    again = grad.clone()
    of_weights = kernels.gate_weighted_backward(grad, gate_up, weights, gate, left)
    assert_same(of_weights, expert_elementwise.gate_weighted_backward(again, gate_up, weights, gate, right))
    assert_same(left, right)
    assert_same(grad, again)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.activation)
def test_weighted_gate_has_the_gradient_of_what_it_computes(gate: Gate) -> None:
    gate_up = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, dtype=torch.float64, requires_grad=True)
    values = torch.empty(9, 6, dtype=torch.float64)
    with torch.no_grad():
        expert_elementwise.gate_weighted(gate_up, weights, gate, values)
    left, right = (gate_up[:, ::2], gate_up[:, 1::2]) if gate.is_interleaved else gate_up.chunk(2, dim=-1)
    if gate.activation == "clamped":
        low = left.clamp(max=1.1)
        wanted = low * torch.sigmoid(1.7 * low) * (right.clamp(-1.1, 1.1) + 1)
    elif gate.activation == "silu":
        wanted = torch.nn.functional.silu(left) * right
    else:
        wanted = torch.nn.functional.gelu(left, approximate="tanh") * right
    wanted = wanted * weights[:, None]
    torch.testing.assert_close(values, wanted)
    grad, room = torch.randn(9, 6, dtype=torch.float64), torch.empty(9, 12, dtype=torch.float64)
    wanted.backward(grad)
    of_weights = expert_elementwise.gate_weighted_backward(grad, gate_up.detach(), weights.detach(), gate, room)
    torch.testing.assert_close(room, gate_up.grad)
    torch.testing.assert_close(of_weights, weights.grad)
    torch.testing.assert_close(grad, wanted.detach())


@pytest.mark.parametrize(("rank", "width"), [(8, 96), (16, 300), (130, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_products_of_each_experts_rows(kernels: ModuleType, rank: int, width: int, dtype: torch.dtype) -> None:
    order = sort_rows(draw_chosen(), NUM_EXPERTS)
    left, _ = rooms(3 * NUM_TOKENS, rank, 8, dtype=dtype)
    left.normal_()
    right = draw(3 * NUM_TOKENS, width, dtype=dtype)
    found = kernels.multiply_outer(left, right, order.ends)
    assert found.shape == (NUM_EXPERTS, rank, width)
    assert_same(found, expert_elementwise.multiply_outer(left, right, order.ends))
    assert not found[-1].any()
    tokens = torch.arange(3 * NUM_TOKENS, device=DEVICE) * 5 % NUM_TOKENS
    found = kernels.multiply_outer(left, right[:NUM_TOKENS], order.ends, tokens)
    assert_same(found, expert_elementwise.multiply_outer(left, right[tokens], order.ends))
