"""The Triton kernels of lanes against plain PyTorch; on a GPU, or in Triton's interpreter: `make test-kernels`."""

import pytest
import torch

from tasks.decoder import lane_products
from tasks.decoder.lane_products import OuterSums, add_thin
from tests.tasks.decoder.kernel_device import DEVICE, DTYPES, assert_same, draw, needs_kernels

pytestmark = needs_kernels
# One lane has no rows, and one more rows than a program takes.
COUNTS = (5, 0, 150, 1)


@pytest.fixture
def ends() -> torch.Tensor:
    return torch.tensor(COUNTS, device=DEVICE).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(("rank", "width", "is_turned"), [(8, 64, True), (72, 200, False), (16, 130, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_thin_rows_are_added(ends: torch.Tensor, rank: int, width: int, is_turned: bool, dtype: torch.dtype) -> None:
    from tasks.decoder import lane_kernels

    thin = draw(sum(COUNTS), rank + 8, dtype=dtype)[:, :rank]
    matrices = (
        draw(len(COUNTS), width, rank, dtype=dtype).mT if is_turned else draw(len(COUNTS), rank, width, dtype=dtype)
    )
    before = draw(sum(COUNTS), width, dtype=dtype)
    found, wanted = before.clone(), before.double()
    lane_kernels.add_thin(found, thin, matrices, ends, max(COUNTS))
    add_thin_plainly(wanted, thin.double(), matrices.double(), ends)
    assert_same(found, wanted, 1e-5 if dtype == torch.float32 else 0.003)


def add_thin_plainly(out: torch.Tensor, thin: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> None:
    begin = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        out[begin:end] += thin[begin:end] @ matrix
        begin = end


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outer_sums_are_added_where_gradients_stay(
    ends: torch.Tensor, is_turned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.decoder import lane_kernels

    firsts, ranks, scales, width = (0, 0, 8, 3), (4, 2, 70, 8), (1.0, 2.0, 0.25, 3.0), 90
    thin, wide = draw(sum(COUNTS), 80, dtype=dtype), draw(sum(COUNTS), width + 8, dtype=dtype)[:, :width]
    shapes = [(width, rank) if is_turned else (rank, width) for rank in ranks]
    before = [draw(*shape, dtype=torch.float32) for shape in shapes]
    found, wanted = [each.clone() for each in before], [each.clone() for each in before]
    borders = [0, *ends.tolist()]
    rows = [slice(*borders[lane : lane + 2]) for lane in range(len(COUNTS))]
    sums = OuterSums(firsts, ranks, scales, is_turned)
    sums._add_one_by_one(wanted, thin, wide, rows)
    table, factors = lane_kernels.tabulate(found, firsts, ranks), torch.tensor(scales, device=DEVICE)
    lane_kernels.add_outer(thin, wide, ends, table, factors, ranks, is_turned=is_turned)
    for left, right in zip(found, wanted, strict=True):
        assert_same(left, right, 1e-5)
    assert torch.equal(found[1], before[1])  # without rows


def test_on_a_cpu_there_are_none() -> None:
    assert lane_products.find_kernels("cpu") is None
    out = torch.ones(3, 2)
    add_thin(out, torch.ones(3, 1), torch.ones(2, 1, 2), torch.tensor([1, 3], dtype=torch.int32), 2)
    assert torch.equal(out, torch.full((3, 2), 2.0))
