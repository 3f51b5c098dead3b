"""The Triton program of the cross entropy, which leaves the gradient where the logits were."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _tanh(values) -> Any:
    return 2 * tl.sigmoid(2 * values) - 1


@triton.jit
def cross_entropy_program(
    logits, targets, losses, stride, width, cap, CAPS: tl.constexpr, BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    """Store -log p(target), and in the logits' place their gradient; a target below 0 gives zeros.

    Where it caps, logits x are first made cap tanh(x / cap).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    highest = -float("inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        if CAPS:
            values = tl.where(columns < width, cap * _tanh(values / cap), -float("inf"))
        block_highest = tl.maximum(highest, tl.max(values, axis=0))
        total = total * tl.exp(highest - block_highest) + tl.sum(tl.exp(values - block_highest), axis=0)
        highest = block_highest
    target = tl.load(targets + row)
    counts = target >= 0
    log_sum = highest + tl.log(total)
    wanted = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    if CAPS:
        wanted = cap * _tanh(wanted / cap)
    loss = log_sum - wanted
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    tl.debug_barrier()  # the target's logit is read before its block is overwritten
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
        slope = 1.0
        if CAPS:
            tanh = _tanh(values / cap)
            values = cap * tanh
            slope = 1 - tanh * tanh
        result = tl.where(counts, (tl.exp(values - log_sum) - tl.where(columns == target, 1.0, 0.0)) * slope, 0.0)
        tl.store(logits + columns, result.to(logits.dtype.element_ty), mask=columns < width)
