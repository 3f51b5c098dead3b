"""The functions of `mixer_elementwise` as Triton kernels, each one pass over its tensors.

Dimensions: `T` tokens, `D` head size, `C` channels of a convolution, `W` its width.
"""

import torch
import triton
from torch import Tensor

from tasks.decoder.mixer_programs import (
    convolve_backward_program,
    convolve_program,
    gate_norm_backward_program,
    gate_norm_program,
    turn_heads_backward_program,
    turn_heads_program,
)

_LEAST_BLOCK = 16
_CONVOLUTION = {"TOKENS": 32, "CHANNELS": 128}
_NORM_ELEMENTS = 2048


def turn_heads(states: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See `mixer_elementwise.turn_heads`."""
    out = states.new_empty(states.shape)
    turn_heads_program[(states.shape[0],)](
        states, out, cos if weight is None else weight, cos, sin,
        states.stride(0), states.stride(1), cos.stride(0), eps,
        **_describe(states, cos), HAS_NORM=weight is not None, num_warps=4,
    )  # fmt: skip
    return out


def turn_heads_backward(
    grad: Tensor,
    states: Tensor | None,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    *,
    adds: bool = False,
) -> None:
    """See `mixer_elementwise.turn_heads_backward`."""
    before = out if states is None else states
    turn_heads_backward_program[(out.shape[0],)](
        grad.contiguous(), before, out, cos if weight is None else weight, cos, sin,
        before.stride(0), before.stride(1), out.stride(0), out.stride(1), cos.stride(0), eps,
        **_describe(out, cos), HAS_NORM=weight is not None, ADDS=adds, num_warps=4,
    )  # fmt: skip


def convolve(values: Tensor, columns: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """See `mixer_elementwise.convolve`."""
    num_tokens, num_channels = values.shape[0], len(columns)
    out = values.new_empty(num_tokens, num_channels)
    convolve_program[_grid(num_tokens, num_channels)](
        values, columns, weight, positions, out, num_tokens, num_channels, values.stride(0),
        WIDTH=weight.shape[1], **_CONVOLUTION, num_warps=4,
    )  # fmt: skip
    return out


def convolve_backward(
    grad: Tensor, values: Tensor, columns: Tensor, weight: Tensor, positions: Tensor, out: Tensor
) -> None:
    """See `mixer_elementwise.convolve_backward`."""
    num_tokens, num_channels = values.shape[0], len(columns)
    convolve_backward_program[_grid(num_tokens, num_channels)](
        grad.contiguous(), values, columns, weight, positions, out, num_tokens, num_channels,
        values.stride(0), out.stride(0), WIDTH=weight.shape[1], **_CONVOLUTION, num_warps=4,
    )  # fmt: skip


def gate_norm(values: Tensor, gates: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mixer_elementwise.gate_norm`."""
    values, gates = values.contiguous(), gates.contiguous()
    out = torch.empty_like(values)
    num_rows, size = values.numel() // values.shape[-1], values.shape[-1]
    block, rows = _shape_rows(size)
    gate_norm_program[(triton.cdiv(num_rows, rows),)](
        values, gates, weight, out, num_rows, eps, SIZE=size, SIZE_BLOCK=block, ROWS=rows, num_warps=4
    )
    return out


def gate_norm_backward(
    grad: Tensor, values: Tensor, gates: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `mixer_elementwise.gate_norm_backward`."""
    grad, values, gates = grad.contiguous(), values.contiguous(), gates.contiguous()
    value_grad, gate_grad = torch.empty_like(values), torch.empty_like(gates)
    num_rows, size = values.numel() // values.shape[-1], values.shape[-1]
    block, rows = _shape_rows(size)
    gate_norm_backward_program[(triton.cdiv(num_rows, rows),)](
        grad, values, gates, weight, value_grad, gate_grad, num_rows, eps,
        SIZE=size, SIZE_BLOCK=block, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return value_grad, gate_grad


def _describe(states: Tensor, cos: Tensor) -> dict[str, int]:
    """Return the constants of the programs for heads [T, heads, D]."""
    _, num, size = states.shape
    half = cos.shape[1]
    return {
        "NUM": num,
        "BLOCK": triton.next_power_of_2(num),
        "SIZE": size,
        "HALF": half,
        "HALF_BLOCK": max(_LEAST_BLOCK, triton.next_power_of_2(max(1, half))),
        "REST_BLOCK": max(_LEAST_BLOCK, triton.next_power_of_2(max(1, size - 2 * half))),
    }


def _grid(num_tokens: int, num_channels: int) -> tuple[int, int]:
    return triton.cdiv(num_tokens, _CONVOLUTION["TOKENS"]), triton.cdiv(num_channels, _CONVOLUTION["CHANNELS"])


def _shape_rows(size: int) -> tuple[int, int]:
    """Return the columns and the rows of a program's block."""
    block = triton.next_power_of_2(size)
    return block, max(1, _NORM_ELEMENTS // block)
