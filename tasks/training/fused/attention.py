"""Causal attention of examples that lie end to end, each alone with itself.

Dimensions: `T` tokens of all examples, `D` head size.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

_FLASH_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Segments:
    """Where the examples lie; a tail of padding is a segment too."""

    borders: Tensor
    """[examples + 1] int32 on the device, from 0 to T."""
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest segment: FlashAttention gives NaN, and no error, for less."""
        return max(self.lengths)

    def move(self, device: torch.device) -> "Segments":
        """Return the segments with their borders on a device."""
        return Segments(self.borders.to(device, non_blocking=True), self.lengths)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, *, scale: float, window: int | None
) -> Tensor:
    """Return causal attention [T, heads, D] within each segment.

    Args:
        queries: [T, num_query, D]
        keys: [T, num_key_value, D]; each serves num_query / num_key_value queries.
        values: likewise.
        segments: end to end, all of T.
        scale: of the scores.
        window: a token sees this many tokens, itself included; None: all before it.
    """
    if queries.is_cuda and queries.dtype in _FLASH_DTYPES and _find_varlen() is not None:
        function, options = _find_varlen()  # type: ignore[misc]
        if "enable_gqa" in options:
            options = {**options, "enable_gqa": queries.shape[1] != keys.shape[1]}
        left = -1 if window is None else window - 1
        return function(
            queries,
            keys,
            values,
            segments.borders,
            segments.borders,
            segments.longest,
            segments.longest,
            scale=scale,
            window_size=(left, 0),
            **options,
        )
    return _attend_one_by_one(queries, keys, values, segments.lengths, scale=scale, window=window)


def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether PyTorch's own FlashAttention takes this device and dtype; else segments are attended one by one."""
    return device.type == "cuda" and dtype in _FLASH_DTYPES and _find_varlen() is not None


@cache
def _find_varlen() -> tuple[Any, dict[str, Any]] | None:
    """Return PyTorch's attention of variable lengths and the options that this release wants; None without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    if "window_size" not in names:
        return None
    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in names else {}


def _attend_one_by_one(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], *, scale: float, window: int | None
) -> Tensor:
    """Attend in each segment by itself: exact on any device, and no work between segments."""
    parts = [states.transpose(0, 1).split(list(lengths), dim=1) for states in (queries, keys, values)]
    results = []
    for query, key, value in zip(*parts, strict=True):
        length = query.shape[1]
        mask = None
        if window is not None and window < length:
            distance = torch.arange(length, device=query.device)
            distance = distance[:, None] - distance[None]
            mask = (distance >= 0) & (distance < window)
        results.append(
            F.scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None, scale=scale,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )[0]
        )  # fmt: skip
    return torch.cat(results, dim=1).transpose(0, 1)
