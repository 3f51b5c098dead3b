"""The Triton program of the cross entropy, which leaves the gradient where the logits were."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def cross_entropy_program(logits, targets, losses, stride, width, BLOCK: tl.constexpr) -> Any:
    """Store -log p(target), and in the logits' place their gradient; a target below 0 gives zeros."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    highest = -float("inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
        block_highest = tl.maximum(highest, tl.max(values, axis=0))
        total = total * tl.exp(highest - block_highest) + tl.sum(tl.exp(values - block_highest), axis=0)
        highest = block_highest
    target = tl.load(targets + row)
    counts = target >= 0
    log_sum = highest + tl.log(total)
    loss = log_sum - tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    tl.debug_barrier()  # the target's logit is read before its block is overwritten
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
        result = tl.where(counts, tl.exp(values - log_sum) - tl.where(columns == target, 1.0, 0.0), 0.0)
        tl.store(logits + columns, result.to(logits.dtype.element_ty), mask=columns < width)
