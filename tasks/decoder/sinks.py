"""Attention with sinks (Xiao et al., 2023; gpt-oss): a learned number for each head joins the scores in their softmax.

Dimensions: `T` tokens of all examples, `D` head size.

With l = log(sum of exp(scores)) of a token and the head's sink s, attention gives out * sigmoid(l - s), and its own
log-sum-exp is log(exp(l) + exp(s)). FlashAttention's backward pass makes the probabilities anew from the log-sum-exp it
is given, and takes the rest of the softmax's gradient from the output: with both of these it is that of attention with
sinks. The sinks themselves are frozen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.decoder.elementwise import widen


def fold_sinks(out: Tensor, log_sums: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return an attention's output [T, heads, D] and log-sum-exp [heads, T] (fp32) with the heads' sinks in them."""
    column = sinks.to(log_sums.dtype)[:, None]
    share = torch.sigmoid(log_sums - column)
    return out * share.t()[..., None].to(out.dtype), torch.logaddexp(log_sums, column)


class FlashSinks(torch.autograd.Function):
    """PyTorch's own FlashAttention with sinks."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sinks: Tensor,
        borders: Tensor,
        longest: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attend as `attention.Attention` says; called as `varlen_attn` calls it."""
        sides = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
        places = borders, borders, longest, longest, 0.0, window is None
        out, log_sums, *random = torch.ops.aten._flash_attention_forward(
            queries, keys, values, *places, return_debug_mask=False, scale=scale, **sides
        )
        out, log_sums = fold_sinks(out, log_sums, sinks)
        ctx.save_for_backward(queries, keys, values, out, log_sums, borders, *random[:2])
        ctx.settings = longest, scale, window is None, sides
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Go back through the attention's own backward pass."""
        queries, keys, values, out, log_sums, borders, *random = ctx.saved_tensors
        longest, scale, is_causal, sides = ctx.settings
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), queries, keys, values, out, log_sums, borders, borders, longest, longest, 0.0,
            is_causal, *random, scale=scale, **sides,
        )  # fmt: skip
        return *grads, None, None, None, None, None


def attend_one_by_one_with_sinks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend in each segment by itself, with a further column in the softmax, as it is defined; [T, heads, D]."""
    repeats = queries.shape[1] // keys.shape[1]
    results = []
    for query, key, value in zip(*(states.split(list(lengths)) for states in (queries, keys, values)), strict=True):
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
        scores = widen(torch.einsum("qhd,khd->hqk", query, key)) * scale
        places = torch.arange(len(query), device=query.device)
        distance = places[:, None] - places[None]
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, len(query), 1)
        shares = torch.cat([scores.masked_fill(hidden, -torch.inf), column], dim=-1).softmax(-1)[..., :-1]
        results.append(torch.einsum("hqk,khd->qhd", shares.to(value.dtype), value))
    return torch.cat(results)
