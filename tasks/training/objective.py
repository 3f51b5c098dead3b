"""What a step optimizes, as one object: a function of the log-probabilities that an engine gives.

    loss of a step = sum over its micro batches of objective.sum_losses / sum over them of objective.count

The engine makes each target's gradient together with its log-probability; what the targets weigh comes with the
objective's backward pass, so that any differentiable function of the log-probabilities costs one pass. Supervised
fine-tuning weighs all trained tokens alike, or as their rows say.

Dimensions: `N` chosen positions of a micro batch, those without a target (log-probability 0) included.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tasks.training.batches import Batch


def count_trained(batch: Batch) -> float:
    """Return the number of trained tokens."""
    return batch.num_trained_tokens


@dataclass(frozen=True)
class Objective:
    """What a training optimizes."""

    name: str
    sum_losses: Callable[[Tensor, Batch], Tensor]
    """(log-probabilities [N], batch) -> what the batch adds to the step's sum, a scalar with a gradient.

    `Batch.choose` gives anything of the batch at the N positions, on the host.
    """
    count: Callable[[Batch], float] = count_trained
    """What the batch adds to the number that the step's sum is divided by; known before the pass."""
    is_plain: Callable[[Batch], bool] = lambda batch: False
    """Whether the sum is that of -log p alone: a recorded pass may then be replayed."""
    figures: tuple[str, ...] = ()
    """Names of what is told besides the loss."""
    sum_figures: Callable[[Tensor, Batch], Tensor] | None = None
    """(log-probabilities [N], batch) -> their sums [K], to be divided as the losses; an objective that has them is
    judged by itself on held-out examples too, and one without by -log p of their tokens."""
    list_losses: Callable[[Tensor, Batch], Tensor] | None = None
    """(log-probabilities [N], batch) -> the loss of each pair [P], where the sum is one over pairs."""


def _sum_weighted(log_probs: Tensor, batch: Batch) -> Tensor:
    """Return the sum of weight * -log p."""
    if batch.weights is None:
        return -log_probs.sum()
    weights = batch.choose(batch.weights).to(log_probs.device, non_blocking=True)
    return -(weights * log_probs).sum()


def _count_weights(batch: Batch) -> float:
    """Return the sum of the trained tokens' weights: one of weight 0 is as one that is not trained."""
    return batch.num_trained_tokens if batch.weights is None else batch.total_weight


SFT = Objective("supervised fine-tuning", _sum_weighted, _count_weights, lambda batch: batch.weights is None)
