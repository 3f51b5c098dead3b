"""The softmax of causal attention whose scores exist as matrices, and its gradient, in plain PyTorch.

Dimensions: `B` matrices, `R` queries that share a key (grouped heads), `L` places.

The rows of a matrix [R L, L] are the places of the first query, then those of the next: row i is at place i mod L, and
sees the columns up to that one.
"""

import torch
from torch import Tensor


def causal_softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return probabilities [B, R L, L] in the dtype, and log sum of exp(scale * score) [B, R L] as wide as the scores.

    Args:
        scores: [B, R L, L] fp32 or fp64.
        scale: of the scores.
        dtype: of the probabilities.
    """
    hidden = _hide(scores)
    scaled = (scores * scale).masked_fill(hidden, -torch.inf)
    log_sums = scaled.logsumexp(-1)
    return (scaled - log_sums[..., None]).exp().to(dtype), log_sums


def causal_softmax_backward(
    scores: Tensor, grads: Tensor, log_sums: Tensor, deltas: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the probabilities again, and the gradient of the scores, both [B, R L, L] in the dtype.

    Args:
        scores: [B, R L, L], as above.
        grads: of the probabilities, likewise.
        log_sums: [B, R L], of `causal_softmax`.
        deltas: [B, R L], sum over the output's columns of output * its gradient.
        scale: of the scores.
        dtype: of what is returned.
    """
    hidden = _hide(scores)
    probabilities = (scores * scale - log_sums[..., None]).masked_fill(hidden, -torch.inf).exp()
    score_grads = probabilities * (grads - deltas[..., None]) * scale
    return probabilities.to(dtype), score_grads.masked_fill(hidden, 0.0).to(dtype)


def _hide(scores: Tensor) -> Tensor:
    """Return what a row does not see, [R L, L]."""
    length = scores.shape[2]
    places = torch.arange(scores.shape[1], device=scores.device) % length
    return torch.arange(length, device=scores.device)[None] > places[:, None]
