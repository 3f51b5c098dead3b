"""What mixers other than Llama's attention do between their products, in plain PyTorch; `mixer_kernels` does the same.

Dimensions: `T` tokens, `D` head size, `C` channels of a convolution, `W` its width.

Arithmetic is in fp32 (fp64 for fp64 input) and rounded once.
"""

import torch
from torch import Tensor


def turn_heads(states: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm heads [T, heads, D] where there is a weight, and rotate their first columns; the result is contiguous.

    Args:
        states: of any strides but for the columns, which lie side by side.
        weight: [D] fp32, the factor of each head's RMS norm; None: no norm.
        eps: of that norm.
        cos: [T, R / 2] of the positions' angles: the first R columns of a head are rotated, in two halves.
        sin: likewise.
    """
    wide = _widen(states)
    if weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return _turn(wide, cos, sin).to(states.dtype).contiguous()


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
    """Write the gradient of `turn_heads`'s first argument to `out` [T, heads, D], or add it to what is there.

    The states are read only where there is a norm.
    """
    result = _turn(_widen(grad), cos, -sin)
    if weight is not None:
        assert states is not None
        wide = _widen(states)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed, scaled = wide * rstd, result * weight
        result = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
    out.copy_(result + _widen(out) if adds else result)


def convolve(values: Tensor, columns: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """Return silu of each channel's causal convolution within its example, [T, C].

    Args:
        values: [T, width], of which some columns are the channels.
        columns: [C] int32, where each channel lies.
        weight: [C, W] fp32; the last one is of the token itself.
        positions: [T] from 0 in each example.
    """
    summed = _sum_taps(_widen(values[:, columns.long()]), weight, positions)
    return (summed * torch.sigmoid(summed)).to(values.dtype)


def convolve_backward(
    grad: Tensor, values: Tensor, columns: Tensor, weight: Tensor, positions: Tensor, out: Tensor
) -> None:
    """Write the gradient of `convolve`'s channels [T, C] to those columns of `out` [T, width]."""
    summed = _sum_taps(_widen(values[:, columns.long()]), weight, positions)
    sigmoid = torch.sigmoid(summed)
    inner = _widen(grad) * sigmoid * (1 + summed * (1 - sigmoid))
    result = inner * weight[:, -1]
    for back in range(1, weight.shape[1]):
        # Token t + back read token t where it is of the same example.
        reads = (positions[back:] >= back)[:, None]
        result[:-back] += torch.where(reads, inner[back:] * weight[:, -1 - back], 0.0)
    out[:, columns.long()] = result.to(out.dtype)


def gate_norm(values: Tensor, gates: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of each head [T, heads, D] times silu of its gate."""
    wide, gate = _widen(values), _widen(gates)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return (normed * gate * torch.sigmoid(gate)).to(values.dtype)


def gate_norm_backward(
    grad: Tensor, values: Tensor, gates: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate_norm`'s values and gates."""
    wide, gate, incoming = _widen(values), _widen(gates), _widen(grad)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    sigmoid, normed = torch.sigmoid(gate), wide * rstd
    gate_grad = incoming * normed * weight * sigmoid * (1 + gate * (1 - sigmoid))
    scaled = incoming * gate * sigmoid * weight
    value_grad = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
    return value_grad.to(values.dtype), gate_grad.to(gates.dtype)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = _widen(cos)[:, None], _widen(sin)[:, None]
    left, right = states[..., :half], states[..., half : 2 * half]
    return torch.cat([left * cos - right * sin, right * cos + left * sin, states[..., 2 * half :]], dim=-1)


def _sum_taps(channels: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    summed = channels * weight[:, -1]
    for back in range(1, weight.shape[1]):
        reads = (positions[back:] >= back)[:, None]
        summed[back:] += torch.where(reads, channels[:-back] * weight[:, -1 - back], 0.0)
    return summed
