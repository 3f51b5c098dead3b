"""Triton programs of the work between the products of routed experts.

All arithmetic is fp32, rounded once when stored. Row numbers are 64-bit.
"""

from typing import Any

import triton
import triton.language as tl

from tasks.decoder.expert_float8_programs import find_expert, store_scaled
from tasks.decoder.gate_programs import activate


@triton.jit
def gather_rows_program(values, tokens, out, values_stride, out_stride, width, BLOCK: tl.constexpr) -> Any:
    """Store a block of the row of a token where an expert wants it."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    token = tl.load(tokens + row)
    loaded = tl.load(values + token * values_stride + columns, mask=inside, other=0.0)
    tl.store(out + row * out_stride + columns, loaded, mask=inside)


@triton.jit
def sum_rows_program(
    rows, places, out, rows_stride, out_stride, width, NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr
) -> Any:
    """Store a block of the sum of a token's rows."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for number in tl.static_range(NUM_CHOSEN):
        place = tl.load(places + token * NUM_CHOSEN + number)
        total += tl.load(rows + place * rows_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def open_gate(
    gate_up, columns, inside, width, alpha, limit, ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr
) -> Any:
    """Return the activation of a row's gate values and its slope, the other factor and its slope."""
    if INTERLEAVED:
        left = tl.load(gate_up + 2 * columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(gate_up + 2 * columns + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        left = tl.load(gate_up + columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(gate_up + width + columns, mask=inside, other=0.0).to(tl.float32)
    right_slope = tl.full(right.shape, 1.0, tl.float32)
    if ACTIVATION == "clamped":
        low = tl.minimum(left, limit)
        sigmoid = tl.sigmoid(low * alpha)
        value = low * sigmoid
        slope = tl.where(left <= limit, sigmoid * (1 + alpha * low * (1 - sigmoid)), 0.0)
        right_slope = tl.where(tl.abs(right) <= limit, 1.0, 0.0)
        right = 1 + tl.minimum(tl.maximum(right, -limit), limit)
    else:
        value, slope = activate(left, ACTIVATION)
    return value, slope, right, right_slope


@triton.jit
def gate_weighted_program(
    gate_up, weights, out, copy, scales, gate_stride, out_stride, width, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Store a block of a row's gated values times the row's weight; with a float8 copy, a block is a whole row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value, _, right, _ = open_gate(
        gate_up + row * gate_stride, columns, inside, width, alpha, limit, ACTIVATION, INTERLEAVED
    )
    weight = tl.load(weights + row).to(tl.float32)
    result = (value * right * weight).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, result, mask=inside)
    if QUANTIZE:
        store_scaled(result.to(tl.float32), copy + row * width, scales + row, columns, inside)


@triton.jit
def gate_weighted_backward_program(
    grad, gate_up, weights, out, weight_grads, copy, scales, factors, ends,
    grad_stride, gate_stride, out_stride, width, num_experts, alpha, limit,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Store a row's gradient of both halves, the weighted gated values over its own, and that of the row's weight.

    With a float8 copy of the gradient, times its expert's factors, the row is read again once its largest is known.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    highest = tl.zeros([BLOCK], dtype=tl.float32)
    own = factors
    if QUANTIZE:
        own += find_expert(ends, row, num_experts, EXPERTS) * 2 * width
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value, slope, right, right_slope = open_gate(
            gate_up + row * gate_stride, columns, inside, width, alpha, limit, ACTIVATION, INTERLEAVED
        )
        incoming = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, incoming * value * right, 0.0)
        of_left = (incoming * weight * right * slope).to(out.dtype.element_ty)
        of_right = (incoming * weight * value * right_slope).to(out.dtype.element_ty)
        if INTERLEAVED:
            left_columns, right_columns = 2 * columns, 2 * columns + 1
        else:
            left_columns, right_columns = columns, width + columns
        tl.store(out + row * out_stride + left_columns, of_left, mask=inside)
        tl.store(out + row * out_stride + right_columns, of_right, mask=inside)
        again = (value * right * weight).to(grad.dtype.element_ty)
        tl.store(grad + row * grad_stride + columns, again, mask=inside)
        if QUANTIZE:
            left_factor = tl.load(own + left_columns, mask=inside, other=0.0)
            right_factor = tl.load(own + right_columns, mask=inside, other=0.0)
            highest = tl.maximum(highest, tl.abs(of_left.to(tl.float32) * left_factor))
            highest = tl.maximum(highest, tl.abs(of_right.to(tl.float32) * right_factor))
    tl.store(weight_grads + row, tl.sum(total, axis=0))
    if QUANTIZE:
        scale = tl.maximum(tl.max(highest, axis=0) / 448.0, 1e-12)
        tl.store(scales + row, scale)
        tl.debug_barrier()  # what other threads have written is read
        for start in range(0, 2 * width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < 2 * width
            made = tl.load(out + row * out_stride + columns, mask=inside, other=0.0).to(tl.float32)
            made *= tl.load(own + columns, mask=inside, other=0.0)
            tl.store(copy + row * 2 * width + columns, (made / scale).to(copy.dtype.element_ty), mask=inside)


@triton.jit
def multiply_outer_program(
    left, right, tokens, ends, out, left_stride, right_stride, rank, width,
    GATHER: tl.constexpr, RANK_BLOCK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    """Store a block of columns of left' right of one expert's rows; of its tokens, where `right` has those."""
    expert = tl.program_id(0)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    ranks = tl.program_id(2) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([RANK_BLOCK, BLOCK], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = rows < end
        first = tl.load(
            left + rows[None, :] * left_stride + ranks[:, None],
            mask=inside[None, :] & (ranks[:, None] < rank), other=0.0,
        )  # fmt: skip
        sources = tl.load(tokens + rows, mask=inside, other=0) if GATHER else rows
        second = tl.load(
            right + sources[:, None] * right_stride + columns[None, :],
            mask=inside[:, None] & (columns[None, :] < width), other=0.0,
        )  # fmt: skip
        total = tl.dot(first, second, total, input_precision="ieee")
    place = out + expert.to(tl.int64) * rank * width + ranks[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(place, total, mask=(ranks[:, None] < rank) & (columns[None, :] < width))
