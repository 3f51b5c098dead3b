"""Attention over examples whose tokens lie on several ranks (Jacobs et al., 2023): heads are exchanged for tokens.

Each rank holds a slice of the tokens with all heads. Before the attention it gives the others their heads of its
slice and gets theirs of its own heads: all tokens of some heads, which attend as on one rank. After it the exchange
goes back. What is exchanged is as much as what a rank holds, whatever the number of ranks.

Dimensions: `C` ranks, `T` tokens of all of them, `t` = T / C of one, `D` head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tasks.decoder.attention import Attention, Segments


@dataclass(frozen=True)
class AcrossRanks:
    """An attention of which each rank does some heads; called like any other with a rank's slice of the tokens."""

    inner: Attention
    group: Any
    """Of torch.distributed: the ranks that share the tokens."""
    rank: int
    """In the group."""
    size: int
    """C"""

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
        """Return [t, heads, D] of this rank's tokens; the segments are those of all T."""
        keys, values = (self._spread(states) for states in (keys, values))
        mine = [_Exchange.apply(states, self.group, self.size) for states in (queries, keys, values)]
        own = queries.shape[1] // self.size
        if sinks is not None:
            sinks = sinks[self.rank * own : (self.rank + 1) * own]
        attended = self.inner(mine[0], mine[1], mine[2], segments, scale=scale, window=window, sinks=sinks)
        result: Tensor = _ExchangeBack.apply(attended, self.group, self.size)
        return result

    def _spread(self, states: Tensor) -> Tensor:
        """Return heads of keys or values of which each rank gets as many; fewer heads than ranks are repeated."""
        return states if states.shape[1] % self.size == 0 else states.repeat_interleave(self.size // states.shape[1], 1)


def can_divide(num_query: int, num_key_value: int, size: int) -> bool:
    """Say whether so many ranks can each take some heads."""
    return num_query % size == 0 and (num_key_value % size == 0 or size % num_key_value == 0)


class _Exchange(torch.autograd.Function):
    """[t, heads, D] -> [T, heads / C, D]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any, size: int) -> Tensor:
        ctx.settings = group, size
        return _give_heads(states, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _give_tokens(grad, *ctx.settings), None, None


class _ExchangeBack(torch.autograd.Function):
    """[T, heads / C, D] -> [t, heads, D]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any, size: int) -> Tensor:
        ctx.settings = group, size
        return _give_tokens(states, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _give_heads(grad, *ctx.settings), None, None


def _give_heads(states: Tensor, group: Any, size: int) -> Tensor:
    """Give each rank its heads of this slice, and return all slices of this rank's heads."""
    sent = states.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # [C, t, heads / C, D]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)


def _give_tokens(states: Tensor, group: Any, size: int) -> Tensor:
    """Give each rank its slice of this rank's heads, and return all heads of this rank's slice."""
    sent = states.unflatten(0, (size, -1)).contiguous()  # [C, t, heads / C, D]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.transpose(0, 1).flatten(1, 2)
