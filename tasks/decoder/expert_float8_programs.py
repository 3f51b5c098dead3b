"""Triton programs of float8 matrices of routed experts: making them, and multiplying with them.

Dimensions: `S` rows ordered by expert, `E` experts, `K` columns that a product sums over, `N` outputs, `C` further
columns.

Scales are fp32, and 448 is the largest e4m3 number. Row numbers are 64-bit.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def store_scaled(values, out, scale_out, columns, inside) -> Any:
    """Store a row in float8 and its scale."""
    scale = tl.maximum(tl.max(tl.where(inside, tl.abs(values), 0.0), axis=0) / 448.0, 1e-12)
    tl.store(scale_out, scale)
    tl.store(out + columns, (values / scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantize_matrices_program(
    weights, out, scales, expert_stride, row_stride, column_stride, num_rows, width, BLOCK: tl.constexpr
) -> Any:
    """Store a row of an expert's matrix in float8, and its scale."""
    row, expert = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    places = weights + expert * expert_stride + row * row_stride + columns.to(tl.int64) * column_stride
    values = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    number = expert * num_rows + row
    store_scaled(values, out + number * width, scales + number, columns, inside)


@triton.jit
def find_expert(ends, row, num_experts, EXPERTS: tl.constexpr) -> Any:
    """Return the expert of a row, 64-bit."""
    experts = tl.arange(0, EXPERTS)
    last = tl.load(ends + experts, mask=experts < num_experts, other=2147483647)
    return tl.sum((last <= row).to(tl.int32), axis=0).to(tl.int64)


@triton.jit
def quantize_expert_rows_program(
    rows, tokens, factors, ends, out, scales, row_stride, width, num_experts,
    GATHER: tl.constexpr, HAS_FACTORS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Store a row, or that of its token, times its expert's factors, in float8, and its scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    source = tl.load(tokens + row) if GATHER else row
    values = tl.load(rows + source * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        expert = find_expert(ends, row, num_experts, EXPERTS)
        values *= tl.load(factors + expert * width + columns, mask=inside, other=0.0)
    store_scaled(values, out + row * width, scales + row, columns, inside)


@triton.jit
def turn_matrices_program(values, out, num_rows, width, BLOCK: tl.constexpr) -> Any:
    """Store a tile of an expert's matrix [num_rows, width] of bytes at its place in the transpose."""
    expert = tl.program_id(2).to(tl.int64) * num_rows * width
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    tile = tl.load(values + expert + rows[:, None] * width + columns[None, :], mask=inside, other=0)
    turned = (columns[:, None] < width) & (rows[None, :] < num_rows)
    tl.store(out + expert + columns[:, None] * num_rows + rows[None, :], tl.trans(tile), mask=turned)


@triton.jit
def find_tile(ends, number, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr) -> Any:
    """Return the expert of a tile of rows, its first row, and where the expert's rows end.

    Each expert has tiles of its own; the expert of a number beyond the last tile is none: `num_experts` or more.
    """
    experts = tl.arange(0, EXPERTS)
    inside = experts < num_experts
    last = tl.load(ends + experts, mask=inside, other=0)
    first = tl.load(ends + experts - 1, mask=inside & (experts > 0), other=0)
    tiles = tl.where(inside, (last - first + ROWS - 1) // ROWS, 0)
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= number).to(tl.int32), axis=0)
    is_own = experts == expert
    before = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    begin = tl.sum(tl.where(is_own, first, 0), axis=0)
    return expert, begin + (number - before) * ROWS, tl.sum(tl.where(is_own, last, 0), axis=0)


@triton.jit
def project_rows_program(
    values, tokens, matrices, ends, out,
    values_stride, width, num_outputs, num_experts, expert_stride, row_stride, column_stride,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
) -> Any:  # fmt: skip
    """Store the rows of some tokens times the transpose of their expert's narrow matrix."""
    expert, start, end = find_tile(ends, tl.program_id(0), num_experts, EXPERTS, ROWS)
    if expert >= num_experts:
        return
    own = start + tl.arange(0, ROWS)
    outputs = tl.arange(0, OUTPUTS)
    steps = tl.arange(0, STEP)
    near = tl.load(tokens + tl.minimum(own, end - 1)).to(tl.int64)
    left = values + near[:, None] * values_stride + steps[None, :]
    right = (
        matrices + expert.to(tl.int64) * expert_stride + outputs[None, :] * row_stride + steps[:, None] * column_stride
    )
    inside = outputs[None, :] < num_outputs
    total = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for done in range(0, width, STEP):
        first = tl.load(left, mask=steps[None, :] < width - done, other=0.0)
        second = tl.load(right, mask=inside & (steps[:, None] < width - done), other=0.0)
        total = tl.dot(first, second, total, input_precision="ieee")
        left += STEP
        right += STEP * column_stride
    place = out + own[:, None].to(tl.int64) * num_outputs + outputs[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(own[:, None] < end) & inside)


@triton.jit
def multiply_quantized_program(
    rows, row_scales, tokens, weights, scales, small, further, ends, out,
    width, num_outputs, num_further, num_experts,
    small_stride, further_expert_stride, further_row_stride, further_column_stride,
    GATHER: tl.constexpr, SCALED: tl.constexpr, FURTHER: tl.constexpr, EVEN: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
) -> Any:  # fmt: skip
    """Store a tile of rows times the transpose of their expert's matrix, plus small times that of its further columns.

    A tile is of one expert; a row is that of its token where there are `tokens`. Rows and outputs beyond the last one
    are the last one again, and are not stored.
    """
    num_columns = tl.cdiv(num_outputs, OUTPUTS)
    tile, column = tl.program_id(0) // num_columns, tl.program_id(0) % num_columns
    expert, start, end = find_tile(ends, tile, num_experts, EXPERTS, ROWS)
    if expert >= num_experts:
        return
    wide = expert.to(tl.int64)
    own = start + tl.arange(0, ROWS)
    outputs = column * OUTPUTS + tl.arange(0, OUTPUTS)
    own_inside, outputs_inside = own < end, outputs < num_outputs
    near = tl.minimum(own, end - 1).to(tl.int64)
    near_outputs = tl.minimum(outputs, num_outputs - 1)
    steps = tl.arange(0, STEP)
    source = tl.load(tokens + near) if GATHER else near
    left = rows + source[:, None] * width + steps[None, :]
    right = weights + wide * num_outputs * width + near_outputs[None, :] * width + steps[:, None]
    total = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for done in range(0, width, STEP):
        if EVEN:
            first, second = tl.load(left), tl.load(right)
        else:
            first = tl.load(left, mask=steps[None, :] < width - done, other=0.0)
            second = tl.load(right, mask=steps[:, None] < width - done, other=0.0)
        total = tl.dot(first, second, total)
        left += STEP
        right += STEP
    total *= tl.load(row_scales + source)[:, None]
    if SCALED:
        total *= tl.load(scales + wide * num_outputs + near_outputs)[None, :]
    if FURTHER > 0:
        ranks = tl.arange(0, FURTHER)
        first = tl.load(
            small + near[:, None] * small_stride + ranks[None, :], mask=ranks[None, :] < num_further, other=0.0
        )
        places = further + wide * further_expert_stride + near_outputs[None, :] * further_row_stride
        second = tl.load(places + ranks[:, None] * further_column_stride, mask=ranks[:, None] < num_further, other=0.0)
        total = tl.dot(first, second, total, input_precision="ieee")
    result = total.to(out.dtype.element_ty)
    place = out + own[:, None].to(tl.int64) * num_outputs + outputs[None, :]
    tl.store(place, result, mask=own_inside[:, None] & outputs_inside[None, :])
