"""The functions of `causal_softmax` as Triton kernels. Imported where there is a GPU only."""

import torch
import triton
from torch import Tensor

from tasks.decoder.causal_softmax_programs import causal_softmax_backward_program, causal_softmax_program


def causal_softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `causal_softmax.causal_softmax`."""
    length = scores.shape[2]
    probabilities = torch.empty_like(scores, dtype=dtype)
    log_sums = scores.new_empty(scores.shape[:2])
    causal_softmax_program[(log_sums.numel(),)](
        scores, probabilities, log_sums, length, scale, BLOCK=triton.next_power_of_2(length), num_warps=4
    )
    return probabilities, log_sums


def causal_softmax_backward(
    scores: Tensor, grads: Tensor, log_sums: Tensor, deltas: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `causal_softmax.causal_softmax_backward`."""
    length = scores.shape[2]
    probabilities, score_grads = (torch.empty_like(scores, dtype=dtype) for _ in range(2))
    causal_softmax_backward_program[(log_sums.numel(),)](
        scores, grads, log_sums, deltas, probabilities, score_grads, length, scale,
        BLOCK=triton.next_power_of_2(length), num_warps=4,
    )  # fmt: skip
    return probabilities, score_grads
