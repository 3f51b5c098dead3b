"""Copies of rows as a Triton kernel. Imported where there is a GPU only."""

import triton
from torch import Tensor

from tasks.decoder.copy_programs import copy_rows_program

_BLOCK = 4096


def copy_rows(source: Tensor, target: Tensor) -> None:
    """See `rooms.copy_rows`."""
    num_rows, width = source.shape
    columns = min(triton.next_power_of_2(max(width, 1)), _BLOCK)
    rows = _BLOCK // columns
    copy_rows_program[(triton.cdiv(num_rows, rows), triton.cdiv(width, columns))](
        source, target, source.stride(0), target.stride(0), num_rows, width, ROWS=rows, COLUMNS=columns, num_warps=8
    )
