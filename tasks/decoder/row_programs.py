"""Triton programs that go along a row of hidden states: norms, and float8 with a scale a row.

A program works on one token's row; all arithmetic is fp32, rounded once when stored. Row numbers are 64-bit.
"""

from typing import Any

import triton
import triton.language as tl

from tasks.decoder.mask_programs import draw_kept


@triton.jit(do_not_specialize=["site", "first_row", "threshold"])
def add_norm_program(
    residual, delta, weight, total, out, rstd_out, quantized, scales, dropped, key,
    residual_stride, delta_stride, total_stride, out_stride, dropped_stride, width, eps,
    site, first_row, threshold, scale,
    HAS_DELTA: tl.constexpr, QUANTIZE: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Store residual + delta, and its norm times the weight."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        values += tl.load(delta + row * delta_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * total_stride + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    tl.store(rstd_out + row, rstd)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result = (values * rstd * factor).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, result, mask=inside)
    if DROP:
        kept = draw_kept(key, site, first_row + row, 0, threshold, BLOCK)
        masked = tl.where(kept, result.to(tl.float32) * scale, 0.0)
        tl.store(dropped + row * dropped_stride + columns, masked.to(dropped.dtype.element_ty), mask=inside)
    if QUANTIZE:
        _store_quantized(result.to(tl.float32), quantized + row * width, scales + row, columns, inside)


@triton.jit(do_not_specialize=["site", "first_row", "threshold"])
def norm_backward_program(
    grad, total, rstd_in, weight, residual_grad, out, quantized, scales, side, key,
    grad_stride, total_stride, residual_stride, out_stride, side_stride, width, site, first_row, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Store the gradient of a norm's input, with the stream's own gradient added."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    rstd = tl.load(rstd_in + row)
    normed = tl.load(total + row * total_stride + columns, mask=inside, other=0.0).to(tl.float32) * rstd
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        further = tl.load(side + row * side_stride + columns, mask=inside, other=0.0).to(tl.float32)
        scaled += tl.where(draw_kept(key, site, first_row + row, 0, threshold, BLOCK), further * scale, 0.0)
    scaled *= factor
    result = (scaled - normed * (tl.sum(scaled * normed, axis=0) / width)) * rstd
    if HAS_RESIDUAL:
        result += tl.load(residual_grad + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = result.to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, rounded, mask=inside)
    if QUANTIZE:
        _store_quantized(rounded.to(tl.float32), quantized + row * width, scales + row, columns, inside)


@triton.jit
def sum_normed_program(
    grad, total, rstd_in, sums, grad_stride, total_stride, num_rows, width,
    PER_PROGRAM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Store the sum over some rows of grad * total * rstd, for a block of columns."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(1).to(tl.int64) * PER_PROGRAM
    found = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, PER_PROGRAM, ROWS):
        rows = first + start + tl.arange(0, ROWS)[:, None]
        inside = (rows < num_rows) & (columns < width)
        left = tl.load(grad + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(total + rows * total_stride + columns, mask=inside, other=0.0).to(tl.float32)
        found += left * right * tl.load(rstd_in + rows, mask=rows < num_rows, other=0.0)
    places = tl.program_id(1) * width + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + places, tl.sum(found, axis=0), mask=tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) < width)


@triton.jit
def _store_quantized(values, quantized, scale_out, columns, inside) -> Any:
    """Store a row in float8 and its scale; 448 is the largest e4m3 number."""
    scale = tl.maximum(tl.max(tl.where(inside, tl.abs(values), 0.0), axis=0) / 448.0, 1e-12)
    tl.store(scale_out, scale)
    tl.store(quantized + columns, (values / scale).to(quantized.dtype.element_ty), mask=inside)


@triton.jit
def quantize_rows_program(values, quantized, scales, stride, width, BLOCK: tl.constexpr) -> Any:
    """Store a row in float8 and its scale."""
    row = tl.program_id(0).to(tl.int64)
    values += row * stride
    quantized += row * width
    highest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        loaded = tl.load(values + columns, mask=columns < width, other=0.0).to(tl.float32)
        highest = tl.maximum(highest, tl.abs(loaded))
    # 448 is the largest e4m3 number
    scale = tl.maximum(tl.max(highest, axis=0) / 448.0, 1e-12)
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        loaded = tl.load(values + columns, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(quantized + columns, (loaded / scale).to(quantized.dtype.element_ty), mask=columns < width)
