"""The work between the matrix products, in plain PyTorch: what the Triton kernels do, on any device and in any dtype.

Dimensions: `T` tokens, `H` hidden size, `I` intermediate size, `D` head size, `N` rows of logits, `V` vocabulary.

Sums and roots are taken in fp32 (fp64 for fp64 input) and rounded once. `out` arguments are written; they may be views
with a row stride above their width, so that a product finds its left factor ready beside other columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder.dropout import MaskedTensor, apply_mask


class Quantized(NamedTuple):
    """Room for a float8 copy of what a kernel writes, a scale a row; only the Triton kernels fill it."""

    values: Tensor
    """[T, width] e4m3"""
    scales: Tensor
    """[T, 1] fp32"""


class Heads(NamedTuple):
    """Layout of a row of queries, keys and values: num_query heads, then num_key_value heads twice, of size each."""

    num_query: int
    num_key_value: int
    size: int
    is_interleaved: bool = False
    """Neighbouring columns are rotated together (Su et al., 2021), in place of those of the two halves."""
    norms_after_rotation: bool = False


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    quantized: None = None,
    dropped: MaskedTensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add delta [T, H] to the residual stream [T, H] and write its RMS norm to `out` (Zhang and Sennrich, 2019).

    Args:
        residual: the stream.
        delta: added; nothing when None.
        weight: [H] fp32, the norm's factor.
        eps: added to the mean square.
        out: [T, H].
        quantized: not made here.
        dropped: where a masked copy of what goes to `out` is wanted.

    Returns:
        total: residual + delta.
        rstd: [T], 1 / sqrt(mean square + eps).
    """
    total = residual if delta is None else residual + delta
    wide = widen(total)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    out.copy_(wide * rstd[:, None] * weight)
    if dropped is not None:
        drop(out, dropped)
    return total, rstd


def norm_backward(
    grad: Tensor,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual_grad: Tensor | None,
    out: Tensor,
    quantized: None = None,
    side: MaskedTensor | None = None,
) -> None:
    """Write the gradient of `add_norm`'s input, from those of the norm and of the sum itself, to `out` [T, H].

    `side` is a further gradient of the norm, which came by way of its masked copy.
    """
    normed = widen(total) * rstd[:, None]
    scaled = _add_side(grad, side) * weight
    result = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd[:, None]
    out.copy_(result if residual_grad is None else result + widen(residual_grad))


def sum_normed(grad: Tensor, total: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient [H] of a norm's weight, fp32 or wider: the sum over tokens of grad * total * rstd.

    Args:
        grad: of the norm's output [T, H].
        total: what was normed [T, H].
        rstd: [T], of `add_norm`.
    """
    return (widen(grad) * widen(total) * rstd[:, None]).sum(0)


def rotate(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [T, heads * D] into queries, keys and values; norm queries and keys where asked, and rotate them.

    Args:
        qkv: the joint product.
        heads: its layout.
        cos: [T, R / 2] of the positions' angles (Su et al., 2021); only the first R columns of a head are rotated, and
            R = D where there are norms.
        sin: likewise.
        query_weight: [D] fp32, the factor of each query head's RMS norm; None: no norm.
        key_weight: likewise for keys.
        eps: of those norms.

    Returns:
        queries [T, num_query, D], keys and values [T, num_key_value, D], each contiguous.
    """
    queries, keys, values = _split(qkv, heads)
    turned = []
    for states, weight in ((queries, query_weight), (keys, key_weight)):
        if heads.norms_after_rotation:
            result = _norm_heads(turn(widen(states), cos, sin, heads), weight, eps)[0]
        else:
            result = turn(_norm_heads(states, weight, eps)[0], cos, sin, heads)
        turned.append(result.to(qkv.dtype).contiguous())
    return turned[0], turned[1], values.contiguous()


def rotate_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    out: Tensor,
    *,
    with_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of `rotate`'s first argument to `out`; qkv is read only where there are norms.

    Returns:
        The gradients [D] of both weights (empty where they are not asked for).
    """
    sums = [cos.new_empty(0), cos.new_empty(0)]
    to_queries, to_keys, to_values = _split(out, heads)
    inputs = (None, None) if qkv is None else _split(qkv, heads)[:2]
    sides = zip(grads, (to_queries, to_keys), inputs, (query_weight, key_weight), strict=False)
    for number, (grad, target, before, weight) in enumerate(sides):
        if weight is None:
            target.copy_(turn(widen(grad), cos, -sin, heads))
            continue
        assert before is not None
        if heads.norms_after_rotation:
            normed, wide = turn(widen(before), cos, sin, heads), widen(grad)
            target.copy_(turn(_norm_heads_back(wide, normed, weight, eps), cos, -sin, heads))
        else:
            normed, wide = before, turn(widen(grad), cos, -sin, heads)
            target.copy_(_norm_heads_back(wide, normed, weight, eps))
        if with_weights:
            sums[number] = (wide * _norm_heads(normed, None, eps, with_rstd=True)[0]).sum((0, 1))
    to_values.copy_(grads[2])
    return sums[0], sums[1]


def gate(
    gate_up: Tensor, activation: str, out: Tensor, quantized: None = None, dropped: MaskedTensor | None = None
) -> None:
    """Write activation(left half) * right half of gate_up [T, 2 I] to `out` [T, I] (Shazeer, 2020)."""
    left, right = widen(gate_up).chunk(2, dim=-1)
    out.copy_(activate(left, activation)[0] * right)
    if dropped is not None:
        drop(out, dropped)


def gate_backward(
    grad: Tensor,
    gate_up: Tensor,
    activation: str,
    out: Tensor,
    quantized: None = None,
    side: MaskedTensor | None = None,
) -> None:
    """Write the gradient of gate_up to `out` [T, 2 I], and over `grad` [T, I] what the adapter had been given.

    `side` is a further gradient of what `gate` gave, which came by way of its masked copy; that copy is then what is
    written over `grad`.
    """
    left, right = widen(gate_up).chunk(2, dim=-1)
    value, slope = activate(left, activation)
    wide = _add_side(grad, side)
    out.copy_(torch.cat([wide * right * slope, wide * value], dim=-1))
    grad.copy_(value * right)
    if side is not None:
        drop(grad, MaskedTensor(grad, side.mask))


def drop(values: Tensor, dropped: MaskedTensor) -> None:
    """Write a masked copy of values [T, H]; it may be in their own place."""
    dropped.values.copy_(apply_mask(widen(values), dropped.mask))


def drop_backward(grad: Tensor, values: Tensor, side: MaskedTensor) -> None:
    """Add to grad [T, H] a gradient that came by way of the masked copy of values; write that copy in its place."""
    grad.copy_(_add_side(grad, side))
    drop(values, side)


def cross_entropy(logits: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Return -log p(target) of each row of logits [N, V], and put its gradient in the logits' place.

    A negative target does not count: its loss and gradient are 0. With a cap c, logits x are first made c tanh(x / c).
    """
    wide = widen(logits)
    slopes = torch.ones_like(wide[:1])
    if cap is not None:
        tanh = torch.tanh(wide / cap)
        wide, slopes = cap * tanh, 1 - tanh.square()
    counts = (targets >= 0).to(wide.dtype)
    places = targets.clamp(min=0)[:, None]
    log_sums = torch.logsumexp(wide, dim=-1)
    losses = (log_sums - wide.gather(1, places)[:, 0]) * counts
    grads = torch.exp(wide - log_sums[:, None])
    grads.scatter_add_(1, places, -torch.ones_like(places, dtype=wide.dtype))
    logits.copy_(grads * slopes * counts[:, None])
    return losses


def widen(tensor: Tensor) -> Tensor:
    """Return 16 bits as fp32, anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _add_side(grad: Tensor, side: MaskedTensor | None) -> Tensor:
    """Return a gradient [T, H] and the one that came by way of the masked copy, in fp32 or wider."""
    return widen(grad) if side is None else widen(grad) + apply_mask(widen(side.values), side.mask)


def _split(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """View [T, heads * D] as queries, keys and values [T, heads, D]."""
    rows = qkv.unflatten(-1, (-1, heads.size))
    first, second = heads.num_query, heads.num_query + heads.num_key_value
    return rows[:, :first], rows[:, first:second], rows[:, second:]


def _norm_heads(states: Tensor, weight: Tensor | None, eps: float, *, with_rstd: bool = False) -> tuple[Tensor, Tensor]:
    """Norm each head [T, heads, D] where there is a weight (or the inverse root is wanted); return it and the root."""
    wide = widen(states)
    if weight is None and not with_rstd:
        return wide, wide
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    return normed if weight is None else normed * weight, rstd


def _norm_heads_back(grad: Tensor, before: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gradient [T, heads, D] of what was normed."""
    normed, rstd = _norm_heads(before, None, eps, with_rstd=True)
    scaled = grad * weight
    return (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd


def turn(states: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor:
    """Rotate the first columns of each head [T, heads, D] by the angles [T, R / 2] of the token's position."""
    half = cos.shape[-1]
    cos, sin = widen(cos)[:, None], widen(sin)[:, None]
    if heads.is_interleaved:
        left, right = states[..., 0 : 2 * half : 2], states[..., 1 : 2 * half : 2]
    else:
        left, right = states[..., :half], states[..., half : 2 * half]
    turned = left * cos - right * sin, right * cos + left * sin
    joined = torch.stack(turned, dim=-1).flatten(-2) if heads.is_interleaved else torch.cat(turned, dim=-1)
    return torch.cat([joined, states[..., 2 * half :]], dim=-1)


def activate(values: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the activation and its slope: silu, or gelu in its tanh form."""
    if activation == "silu":
        sigmoid = torch.sigmoid(values)
        return values * sigmoid, sigmoid * (1 + values * (1 - sigmoid))
    assert activation == "gelu_tanh", activation
    # tanh(u) with u = sqrt(2 / pi) (x + 0.044715 x^3), Hendrycks and Gimpel, 2016
    tanh = torch.tanh(0.7978845608028654 * (values + 0.044715 * values**3))
    inner_slope = 0.7978845608028654 * (1 + 3 * 0.044715 * values.square())
    return F.gelu(values, approximate="tanh"), 0.5 * (1 + tanh) + 0.5 * values * (1 - tanh.square()) * inner_slope
