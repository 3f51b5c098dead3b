"""The functions of `expert_elementwise` as Triton kernels. Imported where there is a GPU only.

Dimensions: `T` tokens, `K` experts a token, `S` = T K rows ordered by expert, `E` experts, `I` intermediate size.
"""

import torch
import triton
from torch import Tensor

from tasks.decoder.expert_elementwise import Gate
from tasks.decoder.expert_float8 import Float8Copy
from tasks.decoder.expert_programs import (
    gate_weighted_backward_program,
    gate_weighted_program,
    gather_rows_program,
    multiply_outer_program,
    sum_rows_program,
)

_ROW_BLOCK = 2048
_GATE_BLOCK = 1024
_OUTER_BLOCK = 128
_OUTER_ROWS = 64
# Smallest and largest side of a matrix product's tile here.
_RANK_BLOCKS = (16, 128)


def gather_rows(values: Tensor, tokens: Tensor, out: Tensor) -> None:
    """See `expert_elementwise.gather_rows`."""
    num_rows, width = out.shape
    block = min(_ROW_BLOCK, triton.next_power_of_2(width))
    gather_rows_program[(num_rows, triton.cdiv(width, block))](
        values, tokens, out, values.stride(0), out.stride(0), width, BLOCK=block, num_warps=4
    )


def sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """See `expert_elementwise.sum_rows`."""
    (num_tokens, num_chosen), width = places.shape, rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    block = min(_GATE_BLOCK, triton.next_power_of_2(width))
    sum_rows_program[(num_tokens, triton.cdiv(width, block))](
        rows, places, out, rows.stride(0), out.stride(0), width, NUM_CHOSEN=num_chosen, BLOCK=block, num_warps=4
    )
    return out


def gate_weighted(gate_up: Tensor, weights: Tensor, gate: Gate, out: Tensor, float8: Float8Copy | None = None) -> None:
    """See `expert_elementwise.gate_weighted`."""
    num_rows, width = out.shape
    block = _choose_block(width, is_whole=float8 is not None)
    copy, scales = (out, weights) if float8 is None else float8.quantized
    gate_weighted_program[(num_rows, triton.cdiv(width, block))](
        gate_up, weights, out, copy, scales, gate_up.stride(0), out.stride(0), width, gate.alpha, gate.limit,
        ACTIVATION=gate.activation, INTERLEAVED=gate.is_interleaved, QUANTIZE=float8 is not None, BLOCK=block,
        num_warps=_count_warps(block),
    )  # fmt: skip


def gate_weighted_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, gate: Gate, out: Tensor, float8: Float8Copy | None = None
) -> Tensor:
    """See `expert_elementwise.gate_weighted_backward`."""
    num_rows, width = grad.shape
    weight_grads = torch.empty(num_rows, dtype=torch.float32, device=grad.device)
    block = _choose_block(width)
    copy, scales, factors, ends = (out, weights, None, weights) if float8 is None else float8
    assert float8 is None or factors is not None
    gate_weighted_backward_program[(num_rows,)](
        grad, gate_up, weights, out, weight_grads, copy, scales, weights if factors is None else factors, ends,
        grad.stride(0), gate_up.stride(0), out.stride(0), width, len(ends), gate.alpha, gate.limit,
        ACTIVATION=gate.activation, INTERLEAVED=gate.is_interleaved, QUANTIZE=float8 is not None,
        EXPERTS=1 if float8 is None else triton.next_power_of_2(len(ends)), BLOCK=block, num_warps=_count_warps(block),
    )  # fmt: skip
    return weight_grads


def multiply_outer(left: Tensor, right: Tensor, ends: Tensor, tokens: Tensor | None = None) -> Tensor:
    """See `expert_elementwise.multiply_outer`."""
    (_, rank), (_, width), num_experts = left.shape, right.shape, len(ends)
    out = torch.empty(num_experts, rank, width, dtype=torch.float32, device=left.device)
    block = min(max(_RANK_BLOCKS[0], triton.next_power_of_2(rank)), _RANK_BLOCKS[1])
    multiply_outer_program[(num_experts, triton.cdiv(width, _OUTER_BLOCK), triton.cdiv(rank, block))](
        left, right, ends if tokens is None else tokens, ends, out, left.stride(0), right.stride(0), rank, width,
        GATHER=tokens is not None, RANK_BLOCK=block, BLOCK=_OUTER_BLOCK, ROWS=_OUTER_ROWS, num_warps=4,
    )  # fmt: skip
    return out


def _choose_block(width: int, *, is_whole: bool = False) -> int:
    """Return columns of a program: of a whole row where its float8 copy is wanted."""
    block = triton.next_power_of_2(width)
    return block if is_whole else min(_GATE_BLOCK, block)


def _count_warps(block: int) -> int:
    """Return warps of a program: 8 columns a thread of wide ones."""
    return max(4, min(16, block // 256))
