"""One optimizer step: gradients over its micro batches, clipped, and one move of the adapter."""

import math

import torch

from tasks.training.batches import Batch
from tasks.training.preparation import Setup
from tasks.training.records import TrainingError


def descend(setup: Setup, batches: list[Batch], learning_rate: float, *, step: int) -> tuple[float, float]:
    """Accumulate the step's gradient over its micro batches, clip it, and move the adapter once.

    Returns:
        loss: nats a trained token of the step.
        grad_norm: before clipping.

    Raises:
        TrainingError: no trained token, or a loss or gradient that is not finite; the adapter is then unchanged.
    """
    num_trained_tokens = sum(batch.num_trained_tokens for batch in batches)
    if num_trained_tokens == 0:
        raise TrainingError(f"step {step}: no trained token in examples {_name_examples(batches)}: remove them")
    loss_sums = []
    for batch in batches:
        loss_sum = setup.engine.sum_losses(batch)
        (loss_sum / num_trained_tokens).backward()
        loss_sums.append(loss_sum.detach())
    grad_norm = torch.nn.utils.clip_grad_norm_(setup.parameters.values(), setup.config.max_grad_norm)
    # The step's only wait for the device: all its numbers at once.
    *sums, norm = torch.stack([*loss_sums, grad_norm]).tolist()
    _check_finite(batches, sums, norm, learning_rate, step=step)
    for group in setup.optimizer.param_groups:
        group["lr"] = learning_rate
    setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)
    return sum(sums) / num_trained_tokens, norm


def _check_finite(batches: list[Batch], sums: list[float], norm: float, learning_rate: float, *, step: int) -> None:
    """Raise TrainingError naming the step and the examples when a micro batch's loss or the gradient is not finite."""
    wrong = [batch for batch, value in zip(batches, sums, strict=True) if not math.isfinite(value)]
    if wrong or not math.isfinite(norm):
        what = "the loss" if wrong else "the gradient's norm"
        raise TrainingError(
            f"step {step}: {what} is not finite (losses {sums}, gradient norm {norm}, learning rate "
            f"{learning_rate:.3g}) on examples {_name_examples(wrong or batches)}: look at these examples, lower "
            "training.learning_rate, or set training.precision to fp32"
        )


def _name_examples(batches: list[Batch]) -> str:
    """List the ids of the batches' examples, at most sixteen."""
    names = [name for batch in batches for name in batch.example_ids]
    return ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
