"""Products of rows with float8 matrices of their experts, in plain PyTorch: what `expert_float8_kernels` does.

Dimensions: `S` rows ordered by expert, `E` experts, `K` columns that a product sums over, `N` outputs, `C` further
columns
(see `grouped`).

A float8 number (e4m3) has three bits of mantissa; a scale a row brings its largest value to 448, the largest number
there is. Products of float8 numbers are exact in fp32, in which they are summed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.decoder.elementwise import Quantized
from tasks.decoder.grouped_products import multiply_grouped

FLOAT8 = torch.float8_e4m3fn
_LARGEST = 448.0
_SMALLEST_SCALE = 1e-12


class Float8Copy(NamedTuple):
    """Room for a float8 copy of rows that are made for an expert's product."""

    values: Tensor
    """[S, K] float8"""
    scales: Tensor
    """[S] fp32"""
    factors: Tensor | None
    """[E, K] fp32, which the rows of each expert are multiplied with before they are quantized."""
    ends: Tensor
    """[E] int32, where the rows of each expert end."""

    @property
    def quantized(self) -> Quantized:
        """What is multiplied."""
        return Quantized(self.values, self.scales)


def make_copy_room(like: Tensor, num_rows: int, width: int, factors: Tensor | None, ends: Tensor) -> Float8Copy:
    """Return room for the float8 copy of rows on a tensor's device."""
    values = like.new_empty(num_rows, width, dtype=FLOAT8)
    return Float8Copy(values, like.new_empty(num_rows, dtype=torch.float32), factors, ends)


def fill_copy(copy: Float8Copy | None, rows: Tensor) -> None:
    """Write the float8 copy of rows where one is wanted."""
    if copy is not None:
        found = quantize_expert_rows(rows, copy.factors, copy.ends)
        copy.values.copy_(found.values)
        copy.scales.copy_(found.scales)


def quantize_matrices(weights: Tensor) -> Quantized:
    """Return matrices [E, N, K] in float8, and the scale of each of their rows [E, N] fp32."""
    scales = (weights.float().abs().amax(-1) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return Quantized((weights.float() / scales[..., None]).to(FLOAT8), scales)


def quantize_expert_rows(rows: Tensor, factors: Tensor | None, ends: Tensor, tokens: Tensor | None = None) -> Quantized:
    """Return rows [S, K] in float8, and the scale of each [S] fp32.

    Args:
        rows: ordered by expert; of tokens [T, K] where these are given.
        factors: [E, K] fp32, which an expert's rows are multiplied with first.
        ends: [E] int32, where the rows of each expert end.
        tokens: [S], whose rows are meant.
    """
    values = (rows if tokens is None else rows.index_select(0, tokens)).float()
    if factors is not None:
        values = values * factors.repeat_interleave(_count(ends), 0)
    scales = (values.abs().amax(-1) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return Quantized((values / scales[:, None]).to(FLOAT8), scales)


def project_rows(values: Tensor, tokens: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return the rows [T, K] of some tokens [S] times the transpose of their expert's matrix [E, C, K]: [S, C]."""
    return multiply_grouped(values.index_select(0, tokens), matrices.mT, ends)


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
    tokens: Tensor | None = None,
) -> Tensor:
    """Return rows [S, K] times the transpose of their expert's matrix, and with it what further columns give: [S, N].

    Args:
        rows: in float8, with a scale each.
        weights: [E, N, K] float8.
        scales: [E, N] of their rows; ones where None.
        small: [S, C], in the dtype of the result.
        further: [E, N, C], in that dtype.
        ends: [E] int32, where the rows of each expert end.
        tokens: [S], whose rows are meant, where `rows` are those of tokens [T, K].
    """
    counts = _count(ends).tolist()
    if tokens is not None:
        numbers = rows.values.view(torch.uint8).index_select(0, tokens).view(FLOAT8)
        rows = Quantized(numbers, rows.scales.index_select(0, tokens))
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
