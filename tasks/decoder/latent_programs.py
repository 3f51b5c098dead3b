"""Triton programs of `latent_kernels`: heads of latent attention put together, and taken apart for their gradient.

A head has PLAIN columns that stay and 2 HALF that are rotated: neighbours together where INTERLEAVED, else columns HALF
apart. A program does all NUM heads of a token, HEADS at a time.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _copy(
    source, source_step, target, target_step, heads, WIDTH, FILLED, NUM: tl.constexpr, BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    """Copy WIDTH columns of some heads of a token, and store zeros behind them up to FILLED."""
    columns = tl.arange(0, BLOCK)[None, :]
    inside = heads < NUM
    values = tl.load(source + heads * source_step + columns, mask=inside & (columns < WIDTH), other=0.0)
    tl.store(target + heads * target_step + columns, values, mask=inside & (columns < FILLED))


@triton.jit
def join_heads_program(
    queries, keys_values, rotated, cos_in, sin_in, to_queries, to_keys, to_values,
    query_stride, other_stride, rotated_stride, angle_stride,
    NUM: tl.constexpr, PLAIN: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr,
    PLAIN_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
) -> Any:  # fmt: skip
    """Store the queries, keys and values of one token."""
    size: tl.constexpr = PLAIN + 2 * HALF
    width: tl.constexpr = PLAIN + VALUE
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    known = columns < HALF
    step: tl.constexpr = 2 if INTERLEAVED else 1
    apart: tl.constexpr = 1 if INTERLEAVED else HALF
    firsts = columns * step
    cos = tl.load(cos_in + token * angle_stride + columns, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(sin_in + token * angle_stride + columns, mask=known, other=0.0).to(tl.float32)
    rotated += token * rotated_stride
    one_left = tl.load(rotated + firsts, mask=known, other=0.0).to(tl.float32)
    one_right = tl.load(rotated + firsts + apart, mask=known, other=0.0).to(tl.float32)
    key_left, key_right = one_left * cos - one_right * sin, one_right * cos + one_left * sin
    queries += token * query_stride
    keys_values += token * other_stride
    to_queries += token * (NUM * size)
    to_keys += token * (NUM * size)
    to_values += token * (NUM * size)
    for start in range(0, NUM, HEADS):
        heads = start + tl.arange(0, HEADS)[:, None]
        inside = (heads < NUM) & known
        _copy(queries, size, to_queries, size, heads, PLAIN, PLAIN, NUM, PLAIN_BLOCK)
        _copy(keys_values, width, to_keys, size, heads, PLAIN, PLAIN, NUM, PLAIN_BLOCK)
        _copy(keys_values + PLAIN, width, to_values, size, heads, VALUE, size, NUM, VALUE_BLOCK)
        places = heads * size + PLAIN + firsts
        left = tl.load(queries + places, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(queries + places + apart, mask=inside, other=0.0).to(tl.float32)
        kind = to_queries.dtype.element_ty
        tl.store(to_queries + places, (left * cos - right * sin).to(kind), mask=inside)
        tl.store(to_queries + places + apart, (right * cos + left * sin).to(kind), mask=inside)
        zeros = tl.zeros([HEADS, HALF_BLOCK], dtype=tl.float32)
        tl.store(to_keys + places, (zeros + key_left).to(kind), mask=inside)
        tl.store(to_keys + places + apart, (zeros + key_right).to(kind), mask=inside)


@triton.jit
def join_heads_backward_program(
    queries, keys, values, cos_in, sin_in, to_queries, to_keys_values, to_rotated,
    query_stride, other_stride, angle_stride,
    NUM: tl.constexpr, PLAIN: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr,
    PLAIN_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
) -> Any:  # fmt: skip
    """Undo `join_heads_program` for the gradients of one token."""
    size: tl.constexpr = PLAIN + 2 * HALF
    width: tl.constexpr = PLAIN + VALUE
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    known = columns < HALF
    step: tl.constexpr = 2 if INTERLEAVED else 1
    apart: tl.constexpr = 1 if INTERLEAVED else HALF
    firsts = columns * step
    cos = tl.load(cos_in + token * angle_stride + columns, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(sin_in + token * angle_stride + columns, mask=known, other=0.0).to(tl.float32)
    queries += token * (NUM * size)
    keys += token * (NUM * size)
    values += token * (NUM * size)
    to_queries += token * query_stride
    to_keys_values += token * other_stride
    kind = to_queries.dtype.element_ty
    all_left = tl.zeros([HEADS, HALF_BLOCK], dtype=tl.float32)
    all_right = tl.zeros([HEADS, HALF_BLOCK], dtype=tl.float32)
    for start in range(0, NUM, HEADS):
        heads = start + tl.arange(0, HEADS)[:, None]
        inside = (heads < NUM) & known
        _copy(queries, size, to_queries, size, heads, PLAIN, PLAIN, NUM, PLAIN_BLOCK)
        _copy(keys, size, to_keys_values, width, heads, PLAIN, PLAIN, NUM, PLAIN_BLOCK)
        _copy(values, size, to_keys_values + PLAIN, width, heads, VALUE, VALUE, NUM, VALUE_BLOCK)
        places = heads * size + PLAIN + firsts
        left = tl.load(queries + places, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(queries + places + apart, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_queries + places, (left * cos + right * sin).to(kind), mask=inside)
        tl.store(to_queries + places + apart, (right * cos - left * sin).to(kind), mask=inside)
        all_left += tl.load(keys + places, mask=inside, other=0.0).to(tl.float32)
        all_right += tl.load(keys + places + apart, mask=inside, other=0.0).to(tl.float32)
    sum_left, sum_right = tl.sum(all_left, axis=0)[None, :], tl.sum(all_right, axis=0)[None, :]
    to_rotated += token * (2 * HALF) + firsts
    tl.store(to_rotated, (sum_left * cos + sum_right * sin).to(kind), mask=known)
    tl.store(to_rotated + apart, (sum_right * cos - sum_left * sin).to(kind), mask=known)
