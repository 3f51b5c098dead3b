"""Triton programs of `mixer_kernels`: heads normed and rotated, convolutions of an example's tokens, gated norms."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def turn_heads_program(
    source, target, weight, cos_in, sin_in, source_stride, head_stride, angle_stride, eps,
    NUM: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
) -> Any:  # fmt: skip
    """Norm and rotate the heads of one token; the columns behind 2 HALF are normed only."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    rests = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    inside, rest_inside = (heads < NUM) & (columns < HALF), (heads < NUM) & (rests < SIZE)
    source += token * source_stride
    target += token * (NUM * SIZE)
    left = tl.load(source + heads * head_stride + columns, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + heads * head_stride + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    rest = tl.load(source + heads * head_stride + rests, mask=rest_inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1) + tl.sum(rest * rest, axis=1)
        rstd = tl.rsqrt(square / SIZE + eps)[:, None]
        left *= rstd * tl.load(weight + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        right *= rstd * tl.load(weight + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        rest *= rstd * tl.load(weight + rests, mask=rests < SIZE, other=0.0).to(tl.float32)
    cos = tl.load(cos_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    turned = left * cos - right * sin
    right = right * cos + left * sin
    tl.store(target + heads * SIZE + columns, turned.to(target.dtype.element_ty), mask=inside)
    tl.store(target + heads * SIZE + HALF + columns, right.to(target.dtype.element_ty), mask=inside)
    tl.store(target + heads * SIZE + rests, rest.to(target.dtype.element_ty), mask=rest_inside)


@triton.jit
def turn_heads_backward_program(
    grad, before, target, weight, cos_in, sin_in, before_stride, before_head, target_stride, target_head, angle_stride,
    eps, NUM: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, HAS_NORM: tl.constexpr, ADDS: tl.constexpr,
) -> Any:  # fmt: skip
    """Undo `turn_heads_program` for the gradient of one token's heads."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    rests = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    inside, rest_inside = (heads < NUM) & (columns < HALF), (heads < NUM) & (rests < SIZE)
    grad += token * (NUM * SIZE) + heads * SIZE
    left = tl.load(grad + columns, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(grad + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    rest = tl.load(grad + rests, mask=rest_inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_in + token * angle_stride + columns, mask=columns < HALF, other=0.0).to(tl.float32)
    turned = left * cos + right * sin
    right = right * cos - left * sin
    left = turned
    if HAS_NORM:
        before += token * before_stride + heads * before_head
        left_normed = tl.load(before + columns, mask=inside, other=0.0).to(tl.float32)
        right_normed = tl.load(before + HALF + columns, mask=inside, other=0.0).to(tl.float32)
        rest_normed = tl.load(before + rests, mask=rest_inside, other=0.0).to(tl.float32)
        square = tl.sum(left_normed * left_normed, axis=1) + tl.sum(right_normed * right_normed, axis=1)
        rstd = tl.rsqrt((square + tl.sum(rest_normed * rest_normed, axis=1)) / SIZE + eps)[:, None]
        left_normed *= rstd
        right_normed *= rstd
        rest_normed *= rstd
        left *= tl.load(weight + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        right *= tl.load(weight + HALF + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        rest *= tl.load(weight + rests, mask=rests < SIZE, other=0.0).to(tl.float32)
        mean = tl.sum(left * left_normed, axis=1) + tl.sum(right * right_normed, axis=1)
        mean = ((mean + tl.sum(rest * rest_normed, axis=1)) / SIZE)[:, None]
        left = (left - left_normed * mean) * rstd
        right = (right - right_normed * mean) * rstd
        rest = (rest - rest_normed * mean) * rstd
    target += token * target_stride + heads * target_head
    if ADDS:
        left += tl.load(target + columns, mask=inside, other=0.0).to(tl.float32)
        right += tl.load(target + HALF + columns, mask=inside, other=0.0).to(tl.float32)
        rest += tl.load(target + rests, mask=rest_inside, other=0.0).to(tl.float32)
    tl.store(target + columns, left.to(target.dtype.element_ty), mask=inside)
    tl.store(target + HALF + columns, right.to(target.dtype.element_ty), mask=inside)
    tl.store(target + rests, rest.to(target.dtype.element_ty), mask=rest_inside)


@triton.jit
def _sum_taps(
    values, weight, positions, tokens, places, channels, inside, num_tokens, stride, WIDTH: tl.constexpr
) -> Any:  # fmt: skip
    """Return the convolution of a block [tokens, channels]; tokens may lie outside, and give anything there."""
    summed = tl.zeros([tokens.shape[0], channels.shape[1]], dtype=tl.float32)
    position = tl.load(positions + tokens, mask=(tokens >= 0) & (tokens < num_tokens), other=-1)
    for back in tl.static_range(0, WIDTH):
        read = tokens - back
        mask = inside & (position >= back)
        tap = tl.load(values + read.to(tl.int64) * stride + places, mask=mask, other=0.0).to(tl.float32)
        summed += tap * tl.load(weight + channels * WIDTH + (WIDTH - 1 - back), mask=channels >= 0, other=0.0)
    return summed


@triton.jit
def convolve_program(
    values, columns, weight, positions, out, num_tokens, num_channels, stride,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
) -> Any:  # fmt: skip
    """Store silu of the convolution of a block of tokens and channels."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (tokens < num_tokens) & (channels < num_channels)
    safe = tl.minimum(channels, num_channels - 1)
    places = tl.load(columns + safe)
    summed = _sum_taps(values, weight, positions, tokens, places, safe, inside, num_tokens, stride, WIDTH)
    result = summed * tl.sigmoid(summed)
    tl.store(out + tokens.to(tl.int64) * num_channels + channels, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def convolve_backward_program(
    grad, values, columns, weight, positions, out, num_tokens, num_channels, stride, out_stride,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
) -> Any:  # fmt: skip
    """Store the gradient of a block's channels where they lie."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (tokens < num_tokens) & (channels < num_channels)
    safe = tl.minimum(channels, num_channels - 1)
    places = tl.load(columns + safe)
    result = tl.zeros([TOKENS, CHANNELS], dtype=tl.float32)
    for ahead in tl.static_range(0, WIDTH):
        reader = tokens + ahead
        reads = (reader < num_tokens) & (channels < num_channels)
        position = tl.load(positions + reader, mask=reader < num_tokens, other=-1)
        summed = _sum_taps(values, weight, positions, reader, places, safe, reads, num_tokens, stride, WIDTH)
        sigmoid = tl.sigmoid(summed)
        mask = reads & (position >= ahead)
        incoming = tl.load(grad + reader.to(tl.int64) * num_channels + channels, mask=mask, other=0.0).to(tl.float32)
        tap = tl.load(weight + safe * WIDTH + (WIDTH - 1 - ahead))
        result += tl.where(mask, incoming * sigmoid * (1 + summed * (1 - sigmoid)) * tap, 0.0)
    tl.store(out + tokens.to(tl.int64) * out_stride + places, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_norm_program(
    values, gates, weight, out, num_rows, eps, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, ROWS: tl.constexpr
) -> Any:  # fmt: skip
    """Store the norm of a block of heads times silu of their gates."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, SIZE_BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < SIZE)
    places = rows * SIZE + columns
    value = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates + places, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, axis=1) / SIZE + eps)[:, None]
    factor = tl.load(weight + columns, mask=columns < SIZE, other=0.0)
    tl.store(out + places, (value * rstd * factor * gate * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_norm_backward_program(
    grad, values, gates, weight, value_grad, gate_grad, num_rows, eps,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, ROWS: tl.constexpr,
) -> Any:  # fmt: skip
    """Store the gradients of `gate_norm_program`'s values and gates."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, SIZE_BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < SIZE)
    places = rows * SIZE + columns
    incoming = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(values + places, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates + places, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, axis=1) / SIZE + eps)[:, None]
    factor = tl.load(weight + columns, mask=columns < SIZE, other=0.0)
    sigmoid = tl.sigmoid(gate)
    normed = value * rstd
    result = incoming * normed * factor * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(gate_grad + places, result.to(gate_grad.dtype.element_ty), mask=inside)
    scaled = incoming * gate * sigmoid * factor
    mean = (tl.sum(scaled * normed, axis=1) / SIZE)[:, None]
    tl.store(value_grad + places, ((scaled - normed * mean) * rstd).to(value_grad.dtype.element_ty), mask=inside)
