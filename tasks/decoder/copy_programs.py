"""The Triton programs that copy matrices."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def copy_matrices_program(table, scales, TARGET: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    """Store a block of one matrix, times its scale, where its row of the table says; see `kernels.copy_matrices`."""
    entry = table + tl.program_id(0) * 5
    source = tl.load(entry).to(tl.pointer_type(tl.float32))
    target = tl.load(entry + 1).to(tl.pointer_type(TARGET))
    size, width, stride = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    places = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    values = tl.load(source + places, mask=inside, other=0.0) * tl.load(scales + tl.program_id(0))
    tl.store(target + places // width * stride + places % width, values.to(TARGET), mask=inside)


@triton.jit
def copy_rows_program(
    source, target, source_stride, target_stride, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> Any:
    """Store a block of a matrix where its rows lie further apart, or nearer."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows) & (columns < width)
    values = tl.load(source + rows * source_stride + columns, mask=inside)
    tl.store(target + rows * target_stride + columns, values, mask=inside)
