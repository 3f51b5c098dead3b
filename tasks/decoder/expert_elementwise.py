"""The work between the products of routed experts, in plain PyTorch: what `expert_kernels` does, on any device.

Dimensions: `T` tokens, `K` experts a token, `S` = T K rows ordered by expert, `E` experts, `I` intermediate size.

Sums are taken in fp32 (fp64 for fp64 input) and rounded once. `out` arguments are written; they may be views with a row
stride above their width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.decoder.elementwise import activate, widen
from tasks.decoder.expert_float8 import Float8Copy, fill_copy


class Gate(NamedTuple):
    """How a row of gate and up values [2 I] becomes one of [I]."""

    activation: str
    """silu, gelu_tanh, or clamped: min(gate, limit) sigmoid(alpha min(gate, limit)) (1 + clamp(up, limit))."""
    is_interleaved: bool = False
    """Gate and up values take turns, in place of one half each."""
    alpha: float = 1.0
    limit: float = 0.0


def gather_rows(values: Tensor, tokens: Tensor, out: Tensor) -> None:
    """Write the row of each of the tokens [S] in values [T, width] to `out` [S, width]."""
    out.copy_(values.index_select(0, tokens))


def sum_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Return the sum of the rows [S, width] at each token's places [T, K]: [T, width]."""
    return widen(rows.index_select(0, places.flatten())).unflatten(0, places.shape).sum(1).to(rows.dtype)


def gate_weighted(gate_up: Tensor, weights: Tensor, gate: Gate, out: Tensor, float8: Float8Copy | None = None) -> None:
    """Write the gated values of gate_up [S, 2 I], times the rows' weights [S], to `out` [S, I]; with a float8 copy."""
    value, _, right, _ = _open_gate(gate_up, gate)
    out.copy_(value * right * widen(weights)[:, None])
    fill_copy(float8, out)


def gate_weighted_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor, gate: Gate, out: Tensor, float8: Float8Copy | None = None
) -> Tensor:
    """Write the gradient of gate_up to `out` [S, 2 I], and over `grad` [S, I] what `gate_weighted` had given.

    Of what goes to `out` there is a float8 copy, where it is wanted.

    Returns:
        The gradient [S] of the rows' weights, in fp32 or wider.
    """
    value, slope, right, right_slope = _open_gate(gate_up, gate)
    wide, factors = widen(grad), widen(weights)[:, None]
    of_left, of_right = wide * factors * right * slope, wide * factors * value * right_slope
    result = (wide * value * right).sum(-1)
    both = of_left, of_right
    out.copy_(torch.stack(both, -1).flatten(-2) if gate.is_interleaved else torch.cat(both, -1))
    fill_copy(float8, out)
    grad.copy_(value * right * factors)
    return result


def multiply_outer(left: Tensor, right: Tensor, ends: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Return left' right [E, R, width] of each expert's rows, in fp32 or wider; zeros of one without rows.

    Args:
        left: [S, R]
        right: [S, width], or [T, width] of tokens.
        ends: [E] int32, where the rows of each expert end.
        tokens: [S], whose rows of `right` are meant.
    """
    right = right if tokens is None else right.index_select(0, tokens)
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    pairs = zip(widen(left).split(counts), widen(right).split(counts), strict=True)
    return torch.stack([first.t() @ second for first, second in pairs])


def _open_gate(gate_up: Tensor, gate: Gate) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the activation of the gate values and its slope, the other factor and its slope, [S, I] each."""
    wide = widen(gate_up)
    left, right = (wide[:, ::2], wide[:, 1::2]) if gate.is_interleaved else wide.chunk(2, dim=-1)
    if gate.activation != "clamped":
        return *activate(left, gate.activation), right, torch.ones_like(right)
    low = left.clamp(max=gate.limit)
    sigmoid = torch.sigmoid(low * gate.alpha)
    slope = sigmoid * (1 + gate.alpha * low * (1 - sigmoid)) * (left <= gate.limit)
    return low * sigmoid, slope, 1 + right.clamp(-gate.limit, gate.limit), (right.abs() <= gate.limit).to(wide.dtype)
