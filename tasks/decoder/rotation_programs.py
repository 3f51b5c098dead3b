"""Triton programs that norm and rotate the heads of one token, and undo it for their gradient.

HALF pairs of columns of a head of SIZE are rotated: neighbours where INTERLEAVED, else columns HALF apart; the rest of
a head is copied. NORM is 0 for none, 1 for before the rotation and 2 for after it; with a norm 2 HALF = SIZE.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _turn_heads(
    source, target, weight, cos, sin, eps,
    NUM: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
) -> Any:  # fmt: skip
    """Norm and rotate the heads of one token; source and target point at its first head."""
    heads = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (heads < NUM) & (columns < HALF)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    apart: tl.constexpr = 1 if INTERLEAVED else HALF
    firsts = columns * step
    places = heads * SIZE + firsts
    left = tl.load(source + places, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + places + apart, mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        turned = left * cos - right * sin
        right = right * cos + left * sin
        left = turned
    if NORM:
        square = (tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)) / SIZE
        rstd = tl.rsqrt(square + eps)[:, None]
        left *= rstd * tl.load(weight + firsts, mask=columns < HALF, other=0.0).to(tl.float32)
        right *= rstd * tl.load(weight + firsts + apart, mask=columns < HALF, other=0.0).to(tl.float32)
    if NORM != 2:
        turned = left * cos - right * sin
        right = right * cos + left * sin
        left = turned
    tl.store(target + places, left.to(target.dtype.element_ty), mask=inside)
    tl.store(target + places + apart, right.to(target.dtype.element_ty), mask=inside)
    if SIZE > 2 * HALF:
        _copy_rest(source, target, NUM, BLOCK, SIZE, HALF)


@triton.jit
def _copy_rest(
    source, target, NUM: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr
) -> Any:  # fmt: skip
    """Copy the columns of a token's heads that are not rotated."""
    heads = tl.arange(0, BLOCK)[:, None]
    for begin in tl.static_range(2 * HALF, SIZE, 16):
        columns = begin + tl.arange(0, 16)[None, :]
        inside = (heads < NUM) & (columns < SIZE)
        places = heads * SIZE + columns
        tl.store(target + places, tl.load(source + places, mask=inside), mask=inside)


@triton.jit
def rotate_program(
    qkv, queries, keys, values, cos_in, sin_in, query_weight, key_weight, qkv_stride, angle_stride, eps,
    NUM_QUERY: tl.constexpr, NUM_KEY: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr,
) -> Any:  # fmt: skip
    """Norm and rotate queries and keys, and copy the values, each to a tensor of its own."""
    token = tl.program_id(0).to(tl.int64)
    row = qkv + token * qkv_stride
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    cos = tl.load(cos_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    _turn_heads(
        row, queries + token * NUM_QUERY * SIZE, query_weight, cos, sin, eps,
        NUM_QUERY, QUERY_BLOCK, SIZE, HALF, HALF_BLOCK, INTERLEAVED, QUERY_NORM,
    )  # fmt: skip
    row += NUM_QUERY * SIZE
    _turn_heads(
        row, keys + token * NUM_KEY * SIZE, key_weight, cos, sin, eps,
        NUM_KEY, KEY_BLOCK, SIZE, HALF, HALF_BLOCK, INTERLEAVED, KEY_NORM,
    )  # fmt: skip
    row += NUM_KEY * SIZE
    _copy_heads(row, values + token * NUM_KEY * SIZE, NUM_KEY, KEY_BLOCK, SIZE, VALUE_BLOCK)


@triton.jit
def _copy_heads(
    source, target, NUM: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    """Copy whole heads of one token."""
    heads = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, SIZE_BLOCK)[None, :]
    inside = (heads < NUM) & (columns < SIZE)
    places = heads * SIZE + columns
    tl.store(target + places, tl.load(source + places, mask=inside), mask=inside)


@triton.jit
def _turn_heads_back(
    grad, before, target, weight, sums, cos, sin, eps,
    NUM: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, SUM: tl.constexpr,
) -> Any:  # fmt: skip
    """Undo `_turn_heads` for the gradient of one token's heads; with SUM, store that of the norm's weight too."""
    heads = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (heads < NUM) & (columns < HALF)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    apart: tl.constexpr = 1 if INTERLEAVED else HALF
    firsts = columns * step
    places = heads * SIZE + firsts
    left = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(grad + places + apart, mask=inside, other=0.0).to(tl.float32)
    if NORM != 2:
        turned = left * cos + right * sin
        right = right * cos - left * sin
        left = turned
    if NORM:
        left_normed = tl.load(before + places, mask=inside, other=0.0).to(tl.float32)
        right_normed = tl.load(before + places + apart, mask=inside, other=0.0).to(tl.float32)
        if NORM == 2:
            turned = left_normed * cos - right_normed * sin
            right_normed = right_normed * cos + left_normed * sin
            left_normed = turned
        square = (tl.sum(left_normed * left_normed, axis=1) + tl.sum(right_normed * right_normed, axis=1)) / SIZE
        rstd = tl.rsqrt(square + eps)[:, None]
        left_normed *= rstd
        right_normed *= rstd
        if SUM:
            only = tl.arange(0, HALF_BLOCK)
            tl.store(sums + only * step, tl.sum(left * left_normed, axis=0), mask=only < HALF)
            tl.store(sums + only * step + apart, tl.sum(right * right_normed, axis=0), mask=only < HALF)
        left *= tl.load(weight + firsts, mask=columns < HALF, other=0.0).to(tl.float32)
        right *= tl.load(weight + firsts + apart, mask=columns < HALF, other=0.0).to(tl.float32)
        mean = ((tl.sum(left * left_normed, axis=1) + tl.sum(right * right_normed, axis=1)) / SIZE)[:, None]
        left = (left - left_normed * mean) * rstd
        right = (right - right_normed * mean) * rstd
    if NORM == 2:
        turned = left * cos + right * sin
        right = right * cos - left * sin
        left = turned
    tl.store(target + places, left.to(target.dtype.element_ty), mask=inside)
    tl.store(target + places + apart, right.to(target.dtype.element_ty), mask=inside)
    if SIZE > 2 * HALF:
        _copy_rest(grad, target, NUM, BLOCK, SIZE, HALF)


@triton.jit
def rotate_backward_program(
    queries, keys, values, before, out, cos_in, sin_in, query_weight, key_weight, query_sums, key_sums,
    before_stride, out_stride, angle_stride, eps,
    NUM_QUERY: tl.constexpr, NUM_KEY: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr, SUM: tl.constexpr,
) -> Any:  # fmt: skip
    """Lay the gradients of queries, keys and values where the projection wants them."""
    token = tl.program_id(0).to(tl.int64)
    source, target = before + token * before_stride, out + token * out_stride
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    cos = tl.load(cos_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    _turn_heads_back(
        queries + token * NUM_QUERY * SIZE, source, target, query_weight, query_sums + token * SIZE, cos, sin, eps,
        NUM_QUERY, QUERY_BLOCK, SIZE, HALF, HALF_BLOCK, INTERLEAVED, QUERY_NORM, SUM,
    )  # fmt: skip
    source += NUM_QUERY * SIZE
    target += NUM_QUERY * SIZE
    _turn_heads_back(
        keys + token * NUM_KEY * SIZE, source, target, key_weight, key_sums + token * SIZE, cos, sin, eps,
        NUM_KEY, KEY_BLOCK, SIZE, HALF, HALF_BLOCK, INTERLEAVED, KEY_NORM, SUM,
    )  # fmt: skip
    target += NUM_KEY * SIZE
    _copy_heads(values + token * NUM_KEY * SIZE, target, NUM_KEY, KEY_BLOCK, SIZE, VALUE_BLOCK)
