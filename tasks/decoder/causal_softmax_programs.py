"""Triton programs of `causal_softmax`: a program works on one row of scores, in fp32."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def causal_softmax_program(
    scores, probabilities, log_sums, length, scale, BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    """Store a row's probabilities, zeros where it does not see, and its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    seen = columns <= row % length
    values = tl.load(scores + row * length + columns, mask=seen, other=-float("inf")) * scale
    highest = tl.max(values, axis=0)
    powers = tl.exp(values - highest)
    total = tl.sum(powers, axis=0)
    tl.store(log_sums + row, highest + tl.log(total))
    result = (powers / total).to(probabilities.dtype.element_ty)
    tl.store(probabilities + row * length + columns, result, mask=columns < length)


@triton.jit
def causal_softmax_backward_program(
    scores, grads, log_sums, deltas, probabilities, score_grads, length, scale, BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    """Store a row's probabilities and the gradient of its scores, zeros where it does not see."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    seen = columns <= row % length
    places = row * length + columns
    values = tl.load(scores + places, mask=seen, other=-float("inf")) * scale
    powers = tl.exp(values - tl.load(log_sums + row))
    slopes = tl.load(grads + places, mask=seen, other=0.0) - tl.load(deltas + row)
    kept = columns < length
    tl.store(probabilities + places, powers.to(probabilities.dtype.element_ty), mask=kept)
    tl.store(score_grads + places, (powers * slopes * scale).to(score_grads.dtype.element_ty), mask=kept)
