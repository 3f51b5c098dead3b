"""Triton programs of lanes (see `lanes`): rows of several adapters, each with the thin matrices of its own lane.

All sums are fp32, rounded once when stored. Row numbers are 64-bit.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def add_thin_program(
    out, thin, matrices, ends, out_stride, thin_stride, lane_stride, rank_stride, column_stride, rank, width,
    ROWS: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Add a block of thin rows times their lane's matrix to the output."""
    lane = tl.program_id(2)
    end = tl.load(ends + lane).to(tl.int64)
    begin = tl.load(ends + lane - 1, mask=lane > 0, other=0).to(tl.int64)
    begin += tl.program_id(0).to(tl.int64) * ROWS
    if begin < end:
        rows = begin + tl.arange(0, ROWS)[:, None]
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        matrices += lane.to(tl.int64) * lane_stride
        total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, rank, RANK_BLOCK):
            inner = start + tl.arange(0, RANK_BLOCK)
            left = tl.load(
                thin + rows * thin_stride + inner[None, :], mask=(rows < end) & (inner[None, :] < rank), other=0.0
            )
            right = tl.load(
                matrices + inner[:, None] * rank_stride + columns * column_stride,
                mask=(inner[:, None] < rank) & (columns < width), other=0.0,
            )  # fmt: skip
            total += tl.dot(left, right, input_precision="ieee")
        inside = (rows < end) & (columns < width)
        places = out + rows * out_stride + columns
        total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
        tl.store(places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_outer_program(
    thin, wide, ends, table, scales, thin_stride, wide_stride, width,
    RANK_BLOCK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr,
) -> Any:  # fmt: skip
    """Add the sum over a lane's rows of thin x wide, times its scale, to the matrix that the table names.

    A row of the table is a lane: where its matrix begins, its first thin column, and how many it has.
    """
    lane = tl.program_id(0)
    end = tl.load(ends + lane)
    begin = tl.load(ends + lane - 1, mask=lane > 0, other=0)
    target = tl.load(table + 3 * lane).to(tl.pointer_type(tl.float32))
    first, rank = tl.load(table + 3 * lane + 1), tl.load(table + 3 * lane + 2)
    ranks = tl.program_id(2) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([RANK_BLOCK, BLOCK], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        left = tl.load(
            thin + rows[None, :] * thin_stride + first + ranks[:, None],
            mask=(rows[None, :] < end) & (ranks[:, None] < rank), other=0.0,
        )  # fmt: skip
        right = tl.load(
            wide + rows[:, None] * wide_stride + columns[None, :],
            mask=(rows[:, None] < end) & (columns[None, :] < width), other=0.0,
        )  # fmt: skip
        total += tl.dot(left, right, input_precision="ieee")
    total *= tl.load(scales + lane)
    if TURNED:
        places = target + columns[None, :] * rank + ranks[:, None]
    else:
        places = target + ranks[:, None] * width + columns[None, :]
    inside = (ranks[:, None] < rank) & (columns[None, :] < width)
    tl.store(places, tl.load(places, mask=inside, other=0.0) + total, mask=inside)
