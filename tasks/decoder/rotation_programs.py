"""Triton programs that norm and rotate the heads of one token, and undo it for their gradient."""

from typing import Any

import triton
import triton.language as tl


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
def rotate_program(
    qkv, queries, keys, values, cos_in, sin_in, query_weight, key_weight, qkv_stride, angle_stride, eps,
    NUM_QUERY: tl.constexpr, NUM_KEY: tl.constexpr, HALF: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr,
) -> Any:  # fmt: skip
    """Norm and rotate queries and keys, and copy the values, each to a tensor of its own."""
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
def rotate_backward_program(
    queries, keys, values, before, out, cos_in, sin_in, query_weight, key_weight,
    before_stride, out_stride, angle_stride, eps,
    NUM_QUERY: tl.constexpr, NUM_KEY: tl.constexpr, HALF: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr,
) -> Any:  # fmt: skip
    """Lay the gradients of queries, keys and values where the projection wants them."""
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
