"""The products of `lane_products` as Triton kernels. Imported where there is a GPU only."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from tasks.decoder.lane_programs import add_outer_program, add_thin_program

_ROWS, _COLUMNS = 128, 128
_OUTER_ROWS, _OUTER_COLUMNS = 64, 64
# Smallest and largest side of a matrix product's tile here.
_RANK_BLOCKS = (16, 64)


def add_thin(out: Tensor, thin: Tensor, matrices: Tensor, ends: Tensor, longest: int) -> None:
    """See `lane_products.add_thin`."""
    num_lanes, rank, width = matrices.shape
    add_thin_program[(triton.cdiv(longest, _ROWS), triton.cdiv(width, _COLUMNS), num_lanes)](
        out, thin, matrices, ends, out.stride(0), thin.stride(0), *matrices.stride(), rank, width,
        ROWS=_ROWS, RANK_BLOCK=_choose_block(rank), BLOCK=_COLUMNS, num_warps=8,
    )  # fmt: skip


def add_outer(
    thin: Tensor, wide: Tensor, ends: Tensor, table: Tensor, scales: Tensor, ranks: Sequence[int], *, is_turned: bool
) -> None:
    """See `lane_products.add_outer`; the table holds where each matrix begins, its first thin column and its rank."""
    width, block = wide.shape[1], _choose_block(max(ranks))
    grid = len(ranks), triton.cdiv(width, _OUTER_COLUMNS), triton.cdiv(max(ranks), block)
    add_outer_program[grid](
        thin, wide, ends, table, scales, thin.stride(0), wide.stride(0), width,
        RANK_BLOCK=block, BLOCK=_OUTER_COLUMNS, ROWS=_OUTER_ROWS, TURNED=is_turned, num_warps=4,
    )  # fmt: skip


def tabulate(targets: Sequence[Tensor], firsts: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """Return the table of `add_outer`, [K, 3] int64."""
    rows = [[target.data_ptr(), first, rank] for target, first, rank in zip(targets, firsts, ranks, strict=True)]
    return torch.tensor(rows, device=targets[0].device)


def _choose_block(rank: int) -> int:
    return min(max(_RANK_BLOCKS[0], triton.next_power_of_2(rank)), _RANK_BLOCKS[1])
