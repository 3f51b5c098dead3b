"""Triton programs of dropout: the masks that `dropout` describes, drawn where they are needed.

A program draws for whole groups of eight columns: one call of Philox each, which fills eight neighbouring elements of a
thread.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def draw_kept(key, site, row, start, threshold, BLOCK: tl.constexpr) -> Any:
    """Return which of a row's columns are kept: [BLOCK] from `start`, a multiple of 8."""
    calls = (start // 8 + tl.arange(0, BLOCK // 8))[:, None].to(tl.uint32)
    nothing = site.to(tl.uint32) * 0
    first, second, third, fourth = tl.philox(
        tl.load(key), calls, row.to(tl.uint32), site.to(tl.uint32), nothing, n_rounds=7
    )
    lanes = tl.arange(0, 8)[None, :]
    words = tl.where(lanes < 4, tl.where(lanes < 2, first, second), tl.where(lanes < 6, third, fourth))
    halves = (words >> ((lanes % 2) * 16).to(tl.uint32)) & 0xFFFF
    return tl.reshape(halves.to(tl.int32), [BLOCK]) >= threshold


@triton.jit(do_not_specialize=["site", "first_row", "threshold"])
def drop_program(
    values, dropped, key, values_stride, dropped_stride, width, site, first_row, threshold, scale, BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    """Store a masked copy of a block."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    inside = columns < width
    loaded = tl.load(values + row * values_stride + columns, mask=inside, other=0.0).to(tl.float32)
    result = tl.where(draw_kept(key, site, first_row + row, start, threshold, BLOCK), loaded * scale, 0.0)
    tl.store(dropped + row * dropped_stride + columns, result.to(dropped.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["site", "first_row", "threshold"])
def drop_backward_program(
    grad, values, side, key, grad_stride, values_stride, side_stride, width, site, first_row, threshold, scale,
    BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Add the masked side gradient of a block to its gradient, and store the masked values in the side's place."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    inside = columns < width
    grad += row * grad_stride
    side += row * side_stride
    total = tl.load(grad + columns, mask=inside, other=0.0).to(tl.float32)
    further = tl.load(side + columns, mask=inside, other=0.0).to(tl.float32)
    loaded = tl.load(values + row * values_stride + columns, mask=inside, other=0.0).to(tl.float32)
    kept = draw_kept(key, site, first_row + row, start, threshold, BLOCK)
    total += tl.where(kept, further * scale, 0.0)
    result = tl.where(kept, loaded * scale, 0.0)
    tl.store(grad + columns, total.to(grad.dtype.element_ty), mask=inside)
    tl.store(side + columns, result.to(side.dtype.element_ty), mask=inside)
