"""Causal attention of examples that lie end to end, each alone with itself.

Dimensions: `T` tokens of all examples, `D` head size.
"""

import inspect
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder.elementwise import Heads
from tasks.decoder.sinks import FlashSinks, attend_one_by_one_with_sinks

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
# Hopper and Blackwell of data centers, first number of the compute capability.
_FLASH4_CAPABILITIES = (9, 10)
# Its gradients were compared with the exact ones at these sizes; at 16 they are wrong.
_FLASH4_HEAD_SIZES = (64, 128, 256)
_FLASH4_LEAST_LENGTH = 512
LARGEST_HEAD = 256
"""Of FlashAttention; `wide_attention` takes larger ones."""
# Above 256 examples it takes other kernels.
_MANY_EXAMPLES = 300

logger = logging.getLogger(__name__)


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

    @cached_property
    def host_borders(self) -> Tensor:
        """[examples + 1] int64 on the host."""
        return torch.tensor([0, *accumulate(self.lengths)])

    @cached_property
    def wide_borders(self) -> Tensor:
        """[examples + 1] int64 on the device."""
        return self.borders.long()

    @cached_property
    def positions(self) -> Tensor:
        """[T] int64 on the device, from 0 in each segment."""
        total = sum(self.lengths)
        lengths = self.wide_borders.diff()
        starts = self.wide_borders[:-1].repeat_interleave(lengths, output_size=total)
        return torch.arange(total, device=self.borders.device) - starts

    def move(self, device: torch.device) -> "Segments":
        """Return the segments with their borders on a device."""
        return Segments(send(self.borders, device), self.lengths)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host's on a device, in the order of its work, which nobody waits for.

    From memory that may be paged out, a GPU's driver copies only once all that was queued before is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Attention(Protocol):
    """Causal attention within each segment."""

    def __call__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        segments: Segments,
        *,
        scale: float,
        window: int | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return [T, heads, D].

        Args:
            queries: [T, num_query, D]
            keys: [T, num_key_value, D]; each serves num_query / num_key_value queries.
            values: likewise.
            segments: end to end, all of T.
            scale: of the scores.
            window: a token sees this many tokens, itself included; None: all before it.
            sinks: [num_query], a number that joins each head's scores in their softmax, and that is not trained.
        """
        ...


def find_attentions(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[Attention, ...]:
    """Return the kinds of attention that there are for a device, a dtype and a head size, the fastest first.

    They are FlashAttention 4 where the package flash-attn-4 is installed, PyTorch's own FlashAttention 2, and one call
    for each segment, which is exact on any device.
    """
    found: list[Attention] = []
    if device.type == "cuda" and dtype in _FLASH_DTYPES:
        is_known = torch.cuda.get_device_capability(device)[0] in _FLASH4_CAPABILITIES
        if is_known and head_size in _FLASH4_HEAD_SIZES and _find_flash4() is not None:
            found.append(attend_flash4)
        if _find_varlen() is not None:
            found.append(attend_varlen)
    return *found, attend_one_by_one


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, *, scale: float, window: int | None
) -> Tensor:
    """Attend with what PyTorch itself brings for these tensors: nothing to compile, and nothing to prove."""
    has_flash = queries.is_cuda and queries.dtype in _FLASH_DTYPES and _find_varlen() is not None
    kind = attend_varlen if has_flash else attend_one_by_one
    return kind(queries, keys, values, segments, scale=scale, window=window)


def name_attention(kind: Attention) -> str:
    """Return what people call it."""
    names: dict[Attention, str] = {attend_flash4: "FlashAttention 4", attend_varlen: "PyTorch's FlashAttention"}
    return names.get(kind, "one call for each example")


def attend_flash4(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend through FlashAttention 4, which compiles its kernels in seconds at their first use and keeps them."""
    function = _find_flash4()
    assert function is not None
    # Upper bounds: below one block there is another kernel, to be compiled in the middle of a training.
    longest = max(segments.longest, _FLASH4_LEAST_LENGTH)
    result: Tensor | tuple[Tensor, ...] = function(
        queries,
        keys,
        values,
        cu_seqlens_q=segments.borders,
        cu_seqlens_k=segments.borders,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=(None if window is None else window - 1, None),
        **({} if sinks is None else {"learnable_sink": sinks.detach().to(torch.bfloat16)}),
    )
    return result[0] if isinstance(result, tuple) else result


def warm_up(
    kind: Attention, heads: Heads, windows: Iterable[int | None], device: torch.device, *, has_sinks: bool = False
) -> None:
    """Have an attention compile, or fetch, what many short examples will want: a training must not wait for it later.

    Raises:
        Exception: of any kind, where a kernel does not compile.
    """
    if kind is not attend_flash4:
        return
    borders = torch.arange(_MANY_EXAMPLES + 1, dtype=torch.int32, device=device)
    segments = Segments(borders, (1,) * _MANY_EXAMPLES)
    counts = (heads.num_query, heads.num_key_value, heads.num_key_value)
    for window in set(windows):
        states = [
            torch.ones(_MANY_EXAMPLES, count, heads.size, device=device, dtype=torch.bfloat16, requires_grad=True)
            for count in counts
        ]
        sinks = torch.zeros(heads.num_query, device=device) if has_sinks else None
        kind(states[0], states[1], states[2], segments, scale=1.0, window=window, sinks=sinks).sum().backward()


def attend_varlen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend through PyTorch's own FlashAttention."""
    if sinks is not None:
        attended: Tensor = FlashSinks.apply(
            queries, keys, values, sinks, segments.borders, segments.longest, scale, window
        )
        return attended
    found = _find_varlen()
    assert found is not None
    function, options = found
    if "enable_gqa" in options:
        options = {**options, "enable_gqa": queries.shape[1] != keys.shape[1]}
    result: Tensor = function(
        queries,
        keys,
        values,
        segments.borders,
        segments.borders,
        segments.longest,
        segments.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return result


@cache
def _find_flash4() -> Any | None:
    """Return FlashAttention 4 for examples of several lengths; None where it is not installed or does not import."""
    # Compiled kernels are code: they are kept where only this user writes.
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(home / "sft-pipeline" / "flash-attention"))
    try:
        from flash_attn.cute.interface import flash_attn_varlen_func  # type: ignore[import-not-found]
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        if not isinstance(error, ModuleNotFoundError):
            logger.warning("flash-attn-4 is installed but does not import (%s)", error)
        return None
    return flash_attn_varlen_func


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


def attend_one_by_one(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend in each segment by itself: exact on any device, and no work between segments."""
    if sinks is not None:
        lengths = segments.lengths
        return attend_one_by_one_with_sinks(queries, keys, values, sinks, lengths, scale=scale, window=window)
    parts = [states.transpose(0, 1).split(list(segments.lengths), dim=1) for states in (queries, keys, values)]
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
