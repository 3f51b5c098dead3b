"""The functions of `expert_float8` as Triton kernels. Imported where there is a GPU only.

Dimensions: `S` rows ordered by expert, `E` experts, `K` columns that a product sums over, `N` outputs, `C` further
columns.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tasks.decoder.elementwise import Quantized
from tasks.decoder.expert_float8_programs import (
    multiply_quantized_program,
    project_rows_program,
    quantize_expert_rows_program,
    quantize_matrices_program,
    turn_matrices_program,
)

_FLOAT8 = torch.float8_e4m3fn
_TURNED_BLOCK = 64
_PROJECTED_ROWS = 128
# Smallest side of a matrix product's tile here.
_SMALLEST_SIDE = 16


class Tiles(NamedTuple):
    """How a product is cut into tiles."""

    rows: int
    outputs: int
    step: int
    """Of K at a time."""
    num_warps: int
    num_stages: int


# Of what was tried on an H200 the fastest: wide ones, but where the last of them would be mostly empty.
_WIDE, _NARROW = Tiles(128, 256, 128, 8, 3), Tiles(128, 128, 128, 4, 3)


def quantize_matrices(weights: Tensor) -> Quantized:
    """See `expert_float8.quantize_matrices`."""
    num_experts, num_rows, width = weights.shape
    values = torch.empty(weights.shape, dtype=_FLOAT8, device=weights.device)
    scales = torch.empty(num_experts, num_rows, dtype=torch.float32, device=weights.device)
    block = triton.next_power_of_2(width)
    quantize_matrices_program[(num_rows, num_experts)](
        weights, values, scales, *weights.stride(), num_rows, width, BLOCK=block, num_warps=_count_warps(block)
    )
    return Quantized(values, scales)


def quantize_expert_rows(rows: Tensor, factors: Tensor | None, ends: Tensor, tokens: Tensor | None = None) -> Quantized:
    """See `expert_float8.quantize_expert_rows`."""
    num_rows, width = len(rows if tokens is None else tokens), rows.shape[1]
    values = torch.empty(num_rows, width, dtype=_FLOAT8, device=rows.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(width)
    quantize_expert_rows_program[(num_rows,)](
        rows, scales if tokens is None else tokens, scales if factors is None else factors, ends, values, scales,
        rows.stride(0), width, len(ends), GATHER=tokens is not None, HAS_FACTORS=factors is not None,
        EXPERTS=triton.next_power_of_2(len(ends)), BLOCK=block, num_warps=_count_warps(block),
    )  # fmt: skip
    return Quantized(values, scales)


def project_rows(values: Tensor, tokens: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """See `expert_float8.project_rows`."""
    (num_experts, num_outputs, width), num_rows = matrices.shape, len(tokens)
    out = torch.empty(num_rows, num_outputs, dtype=values.dtype, device=values.device)
    most_tiles = triton.cdiv(num_rows, _PROJECTED_ROWS) + min(num_experts, num_rows)
    project_rows_program[(most_tiles,)](
        values, tokens, matrices, ends, out, values.stride(0), width, num_outputs, num_experts, *matrices.stride(),
        EXPERTS=triton.next_power_of_2(num_experts), ROWS=_PROJECTED_ROWS,
        OUTPUTS=max(_SMALLEST_SIDE, triton.next_power_of_2(num_outputs)), STEP=64, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def turn_matrices(values: Tensor) -> Tensor:
    """See `expert_float8.turn_matrices`."""
    num_experts, num_rows, width = values.shape
    out = torch.empty(num_experts, width, num_rows, dtype=torch.uint8, device=values.device)
    grid = triton.cdiv(num_rows, _TURNED_BLOCK), triton.cdiv(width, _TURNED_BLOCK), num_experts
    turn_matrices_program[grid](values.view(torch.uint8), out, num_rows, width, BLOCK=_TURNED_BLOCK, num_warps=4)
    return out.view(_FLOAT8)


def multiply_quantized(
    rows: Quantized,
    weights: Tensor,
    scales: Tensor | None,
    small: Tensor,
    further: Tensor,
    ends: Tensor,
    tokens: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """See `expert_float8.multiply_quantized`."""
    if tiles is None:
        tiles = _WIDE if weights.shape[1] % _WIDE.outputs == 0 else _NARROW
    (num_rows, num_further), (num_experts, num_outputs, width) = small.shape, weights.shape
    out = torch.empty(num_rows, num_outputs, dtype=small.dtype, device=small.device)
    # Each expert's last tile may be a part of one.
    most_tiles = triton.cdiv(num_rows, tiles.rows) + min(num_experts, num_rows)
    further_block = max(_SMALLEST_SIDE, triton.next_power_of_2(num_further)) if num_further else 0
    multiply_quantized_program[(most_tiles * triton.cdiv(num_outputs, tiles.outputs),)](
        rows.values, rows.scales, ends if tokens is None else tokens, weights,
        rows.scales if scales is None else scales, small, further, ends, out,
        width, num_outputs, num_further, num_experts, small.stride(0), *further.stride(),
        GATHER=tokens is not None, SCALED=scales is not None, FURTHER=further_block, EVEN=width % tiles.step == 0,
        EXPERTS=triton.next_power_of_2(num_experts), ROWS=tiles.rows, OUTPUTS=tiles.outputs, STEP=tiles.step,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


def _count_warps(block: int) -> int:
    """Return warps of a program that holds a row."""
    return max(1, min(16, block // 512))
