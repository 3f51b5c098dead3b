"""Triton programs of the gated layer's activation, by blocks of a row, or by whole rows with a float8 copy."""

from typing import Any

import triton
import triton.language as tl

from tasks.decoder.mask_programs import draw_kept


@triton.jit
def activate(values, ACTIVATION: tl.constexpr) -> Any:
    """Return the activation and its slope."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(values)
        return values * sigmoid, sigmoid * (1 + values * (1 - sigmoid))
    inner = 0.7978845608028654 * (values + 0.044715 * values * values * values)
    tanh = 2 * tl.sigmoid(2 * inner) - 1
    inner_slope = 0.7978845608028654 * (1 + 0.134145 * values * values)
    return 0.5 * values * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * values * (1 - tanh * tanh) * inner_slope


@triton.jit(do_not_specialize=["site", "first_row", "threshold"])
def gate_program(
    gate_up, out, dropped, key, gate_stride, out_stride, dropped_stride, width, site, first_row, threshold, scale,
    ACTIVATION: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Store activation(left half) * right half of a block."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    inside = columns < width
    left = tl.load(gate_up + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(gate_up + row * gate_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = activate(left, ACTIVATION)
    result = (value * right).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, result, mask=inside)
    if DROP:
        kept = draw_kept(key, site, first_row + row, start, threshold, BLOCK)
        masked = tl.where(kept, result.to(tl.float32) * scale, 0.0)
        tl.store(dropped + row * dropped_stride + columns, masked.to(dropped.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["site", "first_row", "threshold"])
def gate_backward_program(
    grad, gate_up, out, side, key, grad_stride, gate_stride, out_stride, side_stride, width,
    site, first_row, threshold, scale, ACTIVATION: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Store the gradient of both halves, and the gated values (masked where there is dropout) over their own."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    inside = columns < width
    left = tl.load(gate_up + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(gate_up + row * gate_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        further = tl.load(side + row * side_stride + columns, mask=inside, other=0.0).to(tl.float32)
        kept = draw_kept(key, site, first_row + row, start, threshold, BLOCK)
        incoming += tl.where(kept, further * scale, 0.0)
    value, slope = activate(left, ACTIVATION)
    tl.store(out + row * out_stride + columns, (incoming * right * slope).to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * out_stride + width + columns, (incoming * value).to(out.dtype.element_ty), mask=inside)
    result = (value * right).to(grad.dtype.element_ty)
    if DROP:
        masked = tl.where(kept, result.to(tl.float32) * scale, 0.0)
        result = masked.to(grad.dtype.element_ty)
    tl.store(grad + row * grad_stride + columns, result, mask=inside)


@triton.jit(do_not_specialize=["site", "first_row", "threshold"])
def gate_rows_program(
    gate_up, out, quantized, scales, dropped, key, gate_stride, out_stride, dropped_stride, width,
    site, first_row, threshold, scale, ACTIVATION: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """`gate_program` for a whole row; the row is still in the cache when its largest value is known."""
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * gate_stride
    out += row * out_stride
    highest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        left = tl.load(gate_up + columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(gate_up + width + columns, mask=inside, other=0.0).to(tl.float32)
        value, _ = activate(left, ACTIVATION)
        result = (value * right).to(out.dtype.element_ty)
        tl.store(out + columns, result, mask=inside)
        if DROP:
            kept = draw_kept(key, site, first_row + row, start, threshold, BLOCK)
            masked = tl.where(kept, result.to(tl.float32) * scale, 0.0)
            tl.store(dropped + row * dropped_stride + columns, masked.to(dropped.dtype.element_ty), mask=inside)
        highest = tl.maximum(highest, tl.abs(result.to(tl.float32)))
    _requantize(out, quantized + row * width, scales + row, highest, width, BLOCK)


@triton.jit(do_not_specialize=["site", "first_row", "threshold"])
def gate_backward_rows_program(
    grad, gate_up, out, quantized, scales, side, key, grad_stride, gate_stride, out_stride, side_stride, width,
    site, first_row, threshold, scale, ACTIVATION: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """`gate_backward_program` for a whole row; the row is still in the cache when its largest value is known."""
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * gate_stride
    out += row * out_stride
    grad += row * grad_stride
    highest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        left = tl.load(gate_up + columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(gate_up + width + columns, mask=inside, other=0.0).to(tl.float32)
        incoming = tl.load(grad + columns, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            further = tl.load(side + row * side_stride + columns, mask=inside, other=0.0).to(tl.float32)
            kept = draw_kept(key, site, first_row + row, start, threshold, BLOCK)
            incoming += tl.where(kept, further * scale, 0.0)
        value, slope = activate(left, ACTIVATION)
        left_grad = (incoming * right * slope).to(out.dtype.element_ty)
        right_grad = (incoming * value).to(out.dtype.element_ty)
        tl.store(out + columns, left_grad, mask=inside)
        tl.store(out + width + columns, right_grad, mask=inside)
        result = (value * right).to(grad.dtype.element_ty)
        if DROP:
            masked = tl.where(kept, result.to(tl.float32) * scale, 0.0)
            result = masked.to(grad.dtype.element_ty)
        tl.store(grad + columns, result, mask=inside)
        larger = tl.maximum(tl.abs(left_grad.to(tl.float32)), tl.abs(right_grad.to(tl.float32)))
        highest = tl.maximum(highest, larger)
    _requantize(out, quantized + row * (2 * width), scales + row, highest, 2 * width, BLOCK)


@triton.jit
def _requantize(stored, quantized, scale_out, highest, width, BLOCK: tl.constexpr) -> Any:
    """Read back a row that this program has stored, and store it in float8."""
    scale = tl.maximum(tl.max(highest, axis=0) / 448.0, 1e-12)
    tl.store(scale_out, scale)
    tl.debug_barrier()  # all threads' parts of the row are stored
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(stored + columns, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(quantized + columns, (values / scale).to(quantized.dtype.element_ty), mask=columns < width)
