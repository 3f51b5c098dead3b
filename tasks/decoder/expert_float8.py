"""Products of rows with float8 matrices of their experts, in plain PyTorch: what `expert_float8_kernels` does.

Dimensions: `S` rows ordered by expert, `E` experts, `K` columns that a product sums over, `N` outputs, `C` further
columns
(see `grouped`).

A float8 number (e4m3) has three bits of mantissa; a scale a row brings its largest value to 448, the largest number
there is. Products of float8 numbers are exact in fp32, in which they are summed.
"""

import torch
from torch import Tensor

from tasks.decoder.elementwise import Quantized

FLOAT8 = torch.float8_e4m3fn
_LARGEST = 448.0
_SMALLEST_SCALE = 1e-12


def quantize_matrices(weights: Tensor) -> Quantized:
    """Return matrices [E, N, K] in float8, and the scale of each of their rows [E, N] fp32."""
    scales = (weights.float().abs().amax(-1) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return Quantized((weights.float() / scales[..., None]).to(FLOAT8), scales)


def quantize_expert_rows(rows: Tensor, factors: Tensor | None, ends: Tensor) -> Quantized:
    """Return rows [S, K] in float8, and the scale of each [S] fp32.

    Args:
        rows: ordered by expert.
        factors: [E, K] fp32, which an expert's rows are multiplied with first.
        ends: [E] int32, where the rows of each expert end.
    """
    values = rows.float()
    if factors is not None:
        values = values * factors.repeat_interleave(_count(ends), 0)
    scales = (values.abs().amax(-1) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return Quantized((values / scales[:, None]).to(FLOAT8), scales)


def turn_matrices(values: Tensor) -> Tensor:
    """Return float8 matrices [E, N, K] transposed: [E, K, N], each in rows of its own."""
    return values.view(torch.uint8).mT.contiguous().view(FLOAT8)


def multiply_quantized(
    rows: Quantized,
    weights: Tensor,
    scales: Tensor | None,
    small: Tensor,
    further: Tensor,
    ends: Tensor,
) -> Tensor:
    """Return rows [S, K] times the transpose of their expert's matrix, and with it what further columns give: [S, N].

    Args:
        rows: in float8, with a scale each.
        weights: [E, N, K] float8.
        scales: [E, N] of their rows; ones where None.
        small: [S, C], in the dtype of the result.
        further: [E, N, C], in that dtype.
        ends: [E] int32, where the rows of each expert end.
    """
    counts = _count(ends).tolist()
    results = []
    for expert, (part, factor, own) in enumerate(
        zip(rows.values.split(counts), rows.scales.split(counts), small.split(counts), strict=True)
    ):
        result = (part.float() @ weights[expert].float().t()) * factor[:, None]
        if scales is not None:
            result = result * scales[expert]
        results.append(result + own.float() @ further[expert].float().t())
    return torch.cat(results).to(small.dtype)


def _count(ends: Tensor) -> Tensor:
    """Return the number of rows of each expert [E]."""
    return torch.diff(ends, prepend=ends.new_zeros(1))
