"""Rotation of heads in all its forms, against autograd."""

import pytest
import torch

from tasks.decoder.elementwise import Heads, rotate, rotate_backward


@pytest.mark.parametrize(
    ("heads", "num_rotated"),
    [
        (Heads(6, 2, 16), 16),
        (Heads(4, 2, 24), 18),
        (Heads(3, 3, 16, is_interleaved=True), 16),
        (Heads(4, 2, 16, is_interleaved=True), 8),
        (Heads(4, 2, 12, norms_after_rotation=True), 12),
    ],
)
@pytest.mark.parametrize("has_norms", [False, True])
def test_backward_is_the_gradient_of_forward(heads: Heads, num_rotated: int, has_norms: bool) -> None:
    torch.manual_seed(0)
    has_norms = has_norms and num_rotated == heads.size
    width = (heads.num_query + 2 * heads.num_key_value) * heads.size
    qkv = torch.randn(7, width, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 7, num_rotated // 2, dtype=torch.float64)
    first, second = (torch.rand(heads.size, dtype=torch.float64) + 0.5 if has_norms else None for _ in range(2))
    results = rotate(qkv, heads, cos, sin, first, second, 1e-6)
    grads = (torch.randn_like(results[0]), torch.randn_like(results[1]), torch.randn_like(results[2]))
    (wanted,) = torch.autograd.grad(results, qkv, grads)
    found = torch.full((7, width + 5), 7.0, dtype=torch.float64)[:, :width]
    rotate_backward(grads, qkv.detach(), heads, cos, sin, first, second, 1e-6, found)
    torch.testing.assert_close(found, wanted)


def test_columns_that_are_not_rotated_stay() -> None:
    qkv = torch.arange(12.0)[None]
    cos, sin = torch.zeros(1, 1), torch.ones(1, 1)
    queries, keys, values = rotate(qkv, Heads(1, 1, 4), cos, sin, None, None, 0.0)
    assert queries.flatten().tolist() == [-1.0, 0.0, 2.0, 3.0]
    assert keys.flatten().tolist() == [-5.0, 4.0, 6.0, 7.0]
    assert values.flatten().tolist() == [8.0, 9.0, 10.0, 11.0]
