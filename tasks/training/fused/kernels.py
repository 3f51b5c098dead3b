"""The functions of `elementwise` as Triton kernels, each one pass over its tensors. Imported where there is a GPU only.

Dimensions: `T` tokens, `H` hidden size, `I` intermediate size, `D` head size, `N` rows of logits, `V` vocabulary.

A program works on one token's row (or a block of it); all arithmetic is fp32, rounded once when stored. Row numbers are
64-bit: T * V passes 2^31.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.training.fused.elementwise import Heads, Quantized

_GATE_BLOCK = 1024
_VOCABULARY_BLOCK = 8192
_ROW_BLOCK = 4096


def add_norm(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor, quantized: Quantized | None = None
) -> tuple[Tensor, Tensor]:
    """See `elementwise.add_norm`; with a float8 copy of what goes to `out`."""
    num_tokens, width = residual.shape
    total = residual if delta is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    rstd = torch.empty(num_tokens, dtype=torch.float32, device=residual.device)
    block = triton.next_power_of_2(width)
    other = residual if delta is None else delta
    _add_norm[(num_tokens,)](
        residual, other, weight, total, out, rstd, *_side(quantized, rstd),
        residual.stride(0), other.stride(0), total.stride(0), out.stride(0), width, eps,
        HAS_DELTA=delta is not None, QUANTIZE=quantized is not None, BLOCK=block, num_warps=_count_warps(block),
    )  # fmt: skip
    return total, rstd


def norm_backward(
    grad: Tensor,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual_grad: Tensor | None,
    out: Tensor,
    quantized: Quantized | None = None,
) -> None:
    """See `elementwise.norm_backward`; with a float8 copy of what goes to `out`."""
    num_tokens, width = total.shape
    block = triton.next_power_of_2(width)
    other = grad if residual_grad is None else residual_grad
    _norm_backward[(num_tokens,)](
        grad, total, rstd, weight, other, out, *_side(quantized, rstd),
        grad.stride(0), total.stride(0), other.stride(0), out.stride(0), width,
        HAS_RESIDUAL=residual_grad is not None, QUANTIZE=quantized is not None,
        BLOCK=block, num_warps=_count_warps(block),
    )  # fmt: skip


def rotate(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `elementwise.rotate`."""
    num_tokens = qkv.shape[0]
    queries = qkv.new_empty(num_tokens, heads.num_query, heads.size)
    keys = qkv.new_empty(num_tokens, heads.num_key_value, heads.size)
    values = torch.empty_like(keys)
    _rotate[(num_tokens,)](
        qkv, queries, keys, values, cos, sin,
        _or(query_weight, cos), _or(key_weight, cos), qkv.stride(0), cos.stride(0), eps,
        NUM_QUERY=heads.num_query, NUM_KEY=heads.num_key_value, HALF=heads.size // 2,
        QUERY_BLOCK=triton.next_power_of_2(heads.num_query), KEY_BLOCK=triton.next_power_of_2(heads.num_key_value),
        HALF_BLOCK=triton.next_power_of_2(heads.size // 2),
        QUERY_NORM=query_weight is not None, KEY_NORM=key_weight is not None, num_warps=4,
    )  # fmt: skip
    return queries, keys, values


def rotate_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    """See `elementwise.rotate_backward`."""
    queries, keys, values = (grad.contiguous() for grad in grads)
    before = out if qkv is None else qkv
    _rotate_backward[(out.shape[0],)](
        queries, keys, values, before, out, cos, sin,
        _or(query_weight, cos), _or(key_weight, cos), before.stride(0), out.stride(0), cos.stride(0), eps,
        NUM_QUERY=heads.num_query, NUM_KEY=heads.num_key_value, HALF=heads.size // 2,
        QUERY_BLOCK=triton.next_power_of_2(heads.num_query), KEY_BLOCK=triton.next_power_of_2(heads.num_key_value),
        HALF_BLOCK=triton.next_power_of_2(heads.size // 2),
        QUERY_NORM=query_weight is not None, KEY_NORM=key_weight is not None, num_warps=4,
    )  # fmt: skip


def gate(gate_up: Tensor, activation: str, out: Tensor, quantized: Quantized | None = None) -> None:
    """See `elementwise.gate`; with a float8 copy of what goes to `out`."""
    num_tokens, width = out.shape
    if quantized is None:
        _gate[(num_tokens, triton.cdiv(width, _GATE_BLOCK))](
            gate_up, out, gate_up.stride(0), out.stride(0), width, ACTIVATION=activation, BLOCK=_GATE_BLOCK, num_warps=4
        )
        return
    _gate_rows[(num_tokens,)](
        gate_up, out, quantized.values, quantized.scales, gate_up.stride(0), out.stride(0), width,
        ACTIVATION=activation, BLOCK=_ROW_BLOCK, num_warps=8,
    )  # fmt: skip


def gate_backward(
    grad: Tensor, gate_up: Tensor, activation: str, out: Tensor, quantized: Quantized | None = None
) -> None:
    """See `elementwise.gate_backward`; with a float8 copy of what goes to `out`."""
    num_tokens, width = grad.shape
    if quantized is None:
        _gate_backward[(num_tokens, triton.cdiv(width, _GATE_BLOCK))](
            grad, gate_up, out, grad.stride(0), gate_up.stride(0), out.stride(0), width,
            ACTIVATION=activation, BLOCK=_GATE_BLOCK, num_warps=4,
        )  # fmt: skip
        return
    _gate_backward_rows[(num_tokens,)](
        grad, gate_up, out, quantized.values, quantized.scales,
        grad.stride(0), gate_up.stride(0), out.stride(0), width,
        ACTIVATION=activation, BLOCK=_ROW_BLOCK, num_warps=8,
    )  # fmt: skip


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """See `elementwise.cross_entropy`."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _cross_entropy[(logits.shape[0],)](
        logits, targets, losses, logits.stride(0), logits.shape[1], BLOCK=_VOCABULARY_BLOCK, num_warps=16
    )
    return losses


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [T, H] in float8 (e4m3) and the scale of each row [T, 1] fp32: values ~ float8 * scale."""
    num_rows, width = values.shape
    quantized = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=values.device)
    block = min(triton.next_power_of_2(width), 8192)
    _quantize_rows[(num_rows,)](
        values, quantized, scales, values.stride(0), width, BLOCK=block, num_warps=_count_warps(block)
    )
    return quantized, scales


def _count_warps(block: int) -> int:
    """Return warps a program: 8 elements a thread where rows are wide."""
    return max(4, min(16, block // 512))


def _side(quantized: Quantized | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a float8 copy goes, or any tensors in its place where the kernel does not write it."""
    return (other, other) if quantized is None else quantized


def _or(weight: Tensor | None, other: Tensor) -> Tensor:
    """Return the weight, or any tensor in its place where the kernel does not read it."""
    return other if weight is None else weight


@triton.jit
def _add_norm(
    residual, delta, weight, total, out, rstd_out, quantized, scales,
    residual_stride, delta_stride, total_stride, out_stride, width, eps,
    HAS_DELTA: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
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
    if QUANTIZE:
        _store_quantized(result.to(tl.float32), quantized + row * width, scales + row, columns, inside)


@triton.jit
def _store_quantized(values, quantized, scale_out, columns, inside) -> Any:
    """Store a row in float8 and its scale; 448 is the largest e4m3 number."""
    scale = tl.maximum(tl.max(tl.where(inside, tl.abs(values), 0.0), axis=0) / 448.0, 1e-12)
    tl.store(scale_out, scale)
    tl.store(quantized + columns, (values / scale).to(quantized.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    grad, total, rstd_in, weight, residual_grad, out, quantized, scales,
    grad_stride, total_stride, residual_stride, out_stride, width,
    HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    rstd = tl.load(rstd_in + row)
    normed = tl.load(total + row * total_stride + columns, mask=inside, other=0.0).to(tl.float32) * rstd
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32) * factor
    result = (scaled - normed * (tl.sum(scaled * normed, axis=0) / width)) * rstd
    if HAS_RESIDUAL:
        result += tl.load(residual_grad + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = result.to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, rounded, mask=inside)
    if QUANTIZE:
        _store_quantized(rounded.to(tl.float32), quantized + row * width, scales + row, columns, inside)


@triton.jit
def _turn_heads(
    source, target, weight, cos, sin, eps,
    NUM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, NORM: tl.constexpr,
) -> Any:  # fmt: skip
    """Norm and rotate the heads of one token; source and target point at its first head."""
    heads = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (heads < NUM) & (columns < HALF)
    places = heads * (2 * HALF) + columns
    left = tl.load(source + places, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + places + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        square = (tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)) / (2 * HALF)
        rstd = tl.rsqrt(square + eps)[:, None]
        left *= rstd * tl.load(weight + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        right *= rstd * tl.load(weight + columns + HALF, mask=columns < HALF, other=0.0).to(tl.float32)
    tl.store(target + places, (left * cos - right * sin).to(target.dtype.element_ty), mask=inside)
    tl.store(target + places + HALF, (right * cos + left * sin).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    qkv, queries, keys, values, cos_in, sin_in, query_weight, key_weight, qkv_stride, angle_stride, eps,
    NUM_QUERY: tl.constexpr, NUM_KEY: tl.constexpr, HALF: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr,
) -> Any:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = qkv + token * qkv_stride
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    cos = tl.load(cos_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    size = 2 * HALF
    query_row, key_row = queries + token * NUM_QUERY * size, keys + token * NUM_KEY * size
    _turn_heads(row, query_row, query_weight, cos, sin, eps, NUM_QUERY, QUERY_BLOCK, HALF, HALF_BLOCK, QUERY_NORM)
    row += NUM_QUERY * size
    _turn_heads(row, key_row, key_weight, cos, sin, eps, NUM_KEY, KEY_BLOCK, HALF, HALF_BLOCK, KEY_NORM)
    row += NUM_KEY * size
    heads = tl.arange(0, KEY_BLOCK)[:, None]
    inside = (heads < NUM_KEY) & (columns < HALF)
    places = heads * size + columns
    value_row = values + token * NUM_KEY * size
    tl.store(value_row + places, tl.load(row + places, mask=inside), mask=inside)
    tl.store(value_row + places + HALF, tl.load(row + places + HALF, mask=inside), mask=inside)


@triton.jit
def _turn_heads_back(
    grad, before, target, weight, cos, sin, eps,
    NUM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, NORM: tl.constexpr,
) -> Any:  # fmt: skip
    """Undo `_turn_heads` for the gradient of one token's heads."""
    heads = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (heads < NUM) & (columns < HALF)
    places = heads * (2 * HALF) + columns
    left_grad = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    right_grad = tl.load(grad + places + HALF, mask=inside, other=0.0).to(tl.float32)
    left = left_grad * cos + right_grad * sin
    right = right_grad * cos - left_grad * sin
    if NORM:
        left_normed = tl.load(before + places, mask=inside, other=0.0).to(tl.float32)
        right_normed = tl.load(before + places + HALF, mask=inside, other=0.0).to(tl.float32)
        square = (tl.sum(left_normed * left_normed, axis=1) + tl.sum(right_normed * right_normed, axis=1)) / (2 * HALF)
        rstd = tl.rsqrt(square + eps)[:, None]
        left_normed *= rstd
        right_normed *= rstd
        left *= tl.load(weight + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        right *= tl.load(weight + columns + HALF, mask=columns < HALF, other=0.0).to(tl.float32)
        mean = ((tl.sum(left * left_normed, axis=1) + tl.sum(right * right_normed, axis=1)) / (2 * HALF))[:, None]
        left = (left - left_normed * mean) * rstd
        right = (right - right_normed * mean) * rstd
    tl.store(target + places, left.to(target.dtype.element_ty), mask=inside)
    tl.store(target + places + HALF, right.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_backward(
    queries, keys, values, before, out, cos_in, sin_in, query_weight, key_weight,
    before_stride, out_stride, angle_stride, eps,
    NUM_QUERY: tl.constexpr, NUM_KEY: tl.constexpr, HALF: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr,
) -> Any:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    size = 2 * HALF
    source, target = before + token * before_stride, out + token * out_stride
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    cos = tl.load(cos_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    _turn_heads_back(
        queries + token * NUM_QUERY * size, source, target, query_weight, cos, sin, eps,
        NUM_QUERY, QUERY_BLOCK, HALF, HALF_BLOCK, QUERY_NORM,
    )  # fmt: skip
    source += NUM_QUERY * size
    target += NUM_QUERY * size
    _turn_heads_back(
        keys + token * NUM_KEY * size, source, target, key_weight, cos, sin, eps,
        NUM_KEY, KEY_BLOCK, HALF, HALF_BLOCK, KEY_NORM,
    )  # fmt: skip
    target += NUM_KEY * size
    heads = tl.arange(0, KEY_BLOCK)[:, None]
    inside = (heads < NUM_KEY) & (columns < HALF)
    places = heads * size + columns
    value_row = values + token * NUM_KEY * size
    tl.store(target + places, tl.load(value_row + places, mask=inside), mask=inside)
    tl.store(target + places + HALF, tl.load(value_row + places + HALF, mask=inside), mask=inside)


@triton.jit
def _activate(values, ACTIVATION: tl.constexpr) -> Any:
    """Return the activation and its slope."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(values)
        return values * sigmoid, sigmoid * (1 + values * (1 - sigmoid))
    inner = 0.7978845608028654 * (values + 0.044715 * values * values * values)
    tanh = 2 * tl.sigmoid(2 * inner) - 1
    inner_slope = 0.7978845608028654 * (1 + 0.134145 * values * values)
    return 0.5 * values * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * values * (1 - tanh * tanh) * inner_slope


@triton.jit
def _gate(
    gate_up, out, gate_stride, out_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    left = tl.load(gate_up + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(gate_up + row * gate_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(left, ACTIVATION)
    tl.store(out + row * out_stride + columns, (value * right).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(
    grad, gate_up, out, grad_stride, gate_stride, out_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    left = tl.load(gate_up + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(gate_up + row * gate_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(left, ACTIVATION)
    tl.store(out + row * out_stride + columns, (incoming * right * slope).to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * out_stride + width + columns, (incoming * value).to(out.dtype.element_ty), mask=inside)
    tl.store(grad + row * grad_stride + columns, (value * right).to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _gate_rows(
    gate_up, out, quantized, scales, gate_stride, out_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    """`_gate` for a whole row; the row is still in the cache when its largest value is known."""
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * gate_stride
    out += row * out_stride
    highest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        left = tl.load(gate_up + columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(gate_up + width + columns, mask=inside, other=0.0).to(tl.float32)
        value, _ = _activate(left, ACTIVATION)
        result = (value * right).to(out.dtype.element_ty)
        tl.store(out + columns, result, mask=inside)
        highest = tl.maximum(highest, tl.abs(result.to(tl.float32)))
    _requantize(out, quantized + row * width, scales + row, highest, width, BLOCK)


@triton.jit
def _gate_backward_rows(
    grad, gate_up, out, quantized, scales, grad_stride, gate_stride, out_stride, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """`_gate_backward` for a whole row; the row is still in the cache when its largest value is known."""
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
        value, slope = _activate(left, ACTIVATION)
        left_grad = (incoming * right * slope).to(out.dtype.element_ty)
        right_grad = (incoming * value).to(out.dtype.element_ty)
        tl.store(out + columns, left_grad, mask=inside)
        tl.store(out + width + columns, right_grad, mask=inside)
        tl.store(grad + columns, (value * right).to(grad.dtype.element_ty), mask=inside)
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


@triton.jit
def _cross_entropy(logits, targets, losses, stride, width, BLOCK: tl.constexpr) -> Any:
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    highest = -float("inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        block_highest = tl.maximum(highest, tl.max(values, axis=0))
        total = total * tl.exp(highest - block_highest) + tl.sum(tl.exp(values - block_highest), axis=0)
        highest = block_highest
    target = tl.load(targets + row)
    counts = target >= 0
    log_sum = highest + tl.log(total)
    loss = log_sum - tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    tl.debug_barrier()  # the target's logit is read before its block is overwritten
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
        result = tl.where(counts, tl.exp(values - log_sum) - tl.where(columns == target, 1.0, 0.0), 0.0)
        tl.store(logits + columns, result.to(logits.dtype.element_ty), mask=columns < width)


@triton.jit
def _quantize_rows(values, quantized, scales, stride, width, BLOCK: tl.constexpr) -> Any:
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
