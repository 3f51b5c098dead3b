"""Another way to multiply experts in float8, which `expert_products` times beside ours: tiles copied by TMA."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tasks.decoder.elementwise import Quantized
from tasks.decoder.expert_float8_kernels import Tiles
from tasks.decoder.expert_float8_programs import find_tile


@triton.jit
def multiply_described_program(
    rows, row_scales, tokens, weights, scales, small, further, ends, out, plain_rows,
    width, num_outputs, num_further, num_experts,
    small_stride, further_expert_stride, further_row_stride, further_column_stride,
    GATHER: tl.constexpr, SCALED: tl.constexpr, FURTHER: tl.constexpr, EVEN: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
) -> Any:  # fmt: skip
    """As `multiply_quantized_program`; matrices, and rows that are not gathered, come through descriptors."""
    num_columns = tl.cdiv(num_outputs, OUTPUTS)
    tile, column = tl.program_id(0) // num_columns, tl.program_id(0) % num_columns
    expert, start, end = find_tile(ends, tile, num_experts, EXPERTS, ROWS)
    if expert >= num_experts:
        return
    own = start + tl.arange(0, ROWS)
    outputs = column * OUTPUTS + tl.arange(0, OUTPUTS)
    near = tl.minimum(own, end - 1).to(tl.int64)
    near_outputs = tl.minimum(outputs, num_outputs - 1)
    source = tl.load(tokens + near) if GATHER else near
    steps = tl.arange(0, STEP)
    left = plain_rows + source[:, None] * width + steps[None, :]
    total = tl.zeros([ROWS, OUTPUTS], dtype=tl.float32)
    for done in range(0, width, STEP):
        if GATHER:
            first = tl.load(left) if EVEN else tl.load(left, mask=steps[None, :] < width - done, other=0.0)
            left += STEP
        else:
            first = rows.load([start, done])
        second = weights.load([expert * num_outputs + column * OUTPUTS, done])
        total = tl.dot(first, second.T, total)
    total *= tl.load(row_scales + source)[:, None]
    if SCALED:
        total *= tl.load(scales + expert.to(tl.int64) * num_outputs + near_outputs)[None, :]
    if FURTHER > 0:
        ranks = tl.arange(0, FURTHER)
        first = tl.load(
            small + near[:, None] * small_stride + ranks[None, :], mask=ranks[None, :] < num_further, other=0.0
        )
        places = further + expert.to(tl.int64) * further_expert_stride + near_outputs[None, :] * further_row_stride
        second = tl.load(places + ranks[:, None] * further_column_stride, mask=ranks[:, None] < num_further, other=0.0)
        total = tl.dot(first, second, total, input_precision="ieee")
    place = out + own[:, None].to(tl.int64) * num_outputs + outputs[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(own[:, None] < end) & (outputs[None, :] < num_outputs))


def multiply_described(
    rows: Quantized,
    weights: Tensor,
    scales: Tensor | None,
    small: Tensor,
    further: Tensor,
    ends: Tensor,
    tokens: Tensor | None = None,
    *,
    tiles: Tiles,
) -> Tensor:
    """See `expert_float8.multiply_quantized`."""
    (num_rows, num_further), (num_experts, num_outputs, width) = small.shape, weights.shape
    out = torch.empty(num_rows, num_outputs, dtype=small.dtype, device=small.device)
    most_tiles = triton.cdiv(num_rows, tiles.rows) + min(num_experts, num_rows)
    multiply_described_program[(most_tiles * triton.cdiv(num_outputs, tiles.outputs),)](
        TensorDescriptor.from_tensor(rows.values, [tiles.rows, tiles.step]), rows.scales,
        ends if tokens is None else tokens,
        TensorDescriptor.from_tensor(weights.view(-1, width), [tiles.outputs, tiles.step]),
        rows.scales if scales is None else scales, small, further, ends, out, rows.values,
        width, num_outputs, num_further, num_experts, small.stride(0), *further.stride(),
        GATHER=tokens is not None, SCALED=scales is not None,
        FURTHER=max(16, triton.next_power_of_2(num_further)) if num_further else 0, EVEN=width % tiles.step == 0,
        EXPERTS=triton.next_power_of_2(num_experts), ROWS=tiles.rows, OUTPUTS=tiles.outputs, STEP=tiles.step,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out
