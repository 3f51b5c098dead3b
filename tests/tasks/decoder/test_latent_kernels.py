"""The kernels of latent attention against plain PyTorch: on a GPU, or in Triton's interpreter."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from tasks.decoder import latent_elementwise
from tasks.decoder.latent_elementwise import LatentHeads
from tests.tasks.decoder.kernel_device import DEVICE, DTYPES, NUM_ROWS, assert_same, draw, needs_kernels, rooms

# DeepSeek-V3's heads, GLM-4.7-Flash's, and some whose sizes are no powers of two and no multiples of 16.
LAYOUTS = [
    LatentHeads(20, 128, 64, 128, is_interleaved=True),
    LatentHeads(3, 192, 64, 256, is_interleaved=False),
    LatentHeads(5, 24, 12, 20, is_interleaved=True),
]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from tasks.decoder import latent_kernels

    return latent_kernels


@needs_kernels
@pytest.mark.parametrize("heads", LAYOUTS, ids=lambda heads: str(heads.size))
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_put_together_and_taken_apart(kernels: ModuleType, heads: LatentHeads, dtype: torch.dtype) -> None:
    queries = draw(NUM_ROWS, heads.num * heads.size + 8, dtype=dtype)[:, : heads.num * heads.size]
    keys_values = draw(NUM_ROWS, heads.num * (heads.plain + heads.value), dtype=dtype)
    rotated = draw(NUM_ROWS, heads.rotated + 24, dtype=dtype)[:, : heads.rotated]
    cos, sin = (torch.randn(NUM_ROWS, heads.rotated // 2, device=DEVICE) for _ in range(2))
    found = kernels.join_heads(queries, keys_values, rotated, cos, sin, heads)
    wanted = latent_elementwise.join_heads(queries, keys_values, rotated, cos, sin, heads)
    for left, right in zip(found, wanted, strict=True):
        assert_same(left, right)
    first, second, third = (draw(NUM_ROWS, heads.num, heads.size, dtype=dtype) for _ in range(3))
    grads = first, second, third
    places = [
        *rooms(NUM_ROWS, heads.num * heads.size, dtype=dtype),
        *rooms(NUM_ROWS, heads.num * (heads.plain + heads.value), dtype=dtype),
    ]
    found = kernels.join_heads_backward(grads, cos, sin, heads, places[0], places[2])
    assert_same(found, latent_elementwise.join_heads_backward(grads, cos, sin, heads, places[1], places[3]))
    assert_same(places[0], places[1])
    assert_same(places[2], places[3])


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_the_gradient_is_that_of_what_is_computed(is_interleaved: bool) -> None:
    torch.manual_seed(0)
    heads = LatentHeads(3, 6, 4, 8, is_interleaved)
    widths = 3 * 10, 3 * 14, 4
    inputs = q, k, r = tuple(torch.randn(5, width, dtype=torch.float64, requires_grad=True) for width in widths)
    cos, sin = torch.randn(2, 5, 2, dtype=torch.float64)
    outputs = latent_elementwise.join_heads(q, k, r, cos, sin, heads)
    assert not outputs[2][..., 8:].any()
    # Scores between two tokens are those of the columns that stay and of the rotated ones.
    pairs = q.unflatten(1, (3, 10))[1, 2, :6] @ k.unflatten(1, (3, 14))[4, 2, :6]
    turned = [_rotate(states, cos[place], sin[place], is_interleaved) for states, place in
              ((q.unflatten(1, (3, 10))[1, 2, 6:], 1), (r[4], 4))]  # fmt: skip
    torch.testing.assert_close(outputs[0][1, 2] @ outputs[1][4, 2], pairs + turned[0] @ turned[1])
    grads = tuple(torch.randn_like(output) for output in outputs)
    wanted = torch.autograd.grad(outputs, inputs, grads)
    to_queries, to_keys_values = torch.empty_like(q), torch.empty_like(k)
    of_rotated = latent_elementwise.join_heads_backward(
        (grads[0], grads[1], grads[2]), cos, sin, heads, to_queries, to_keys_values
    )
    for left, right in zip((to_queries, to_keys_values, of_rotated), wanted, strict=True):
        torch.testing.assert_close(left, right)


def _rotate(columns: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
    left, right = (columns[::2], columns[1::2]) if is_interleaved else columns.chunk(2)
    return torch.cat([left * cos - right * sin, right * cos + left * sin])
