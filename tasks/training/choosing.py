"""Which candidate of a sweep is taken, and what is left of its held-out loss after it was chosen.

Dimensions: `K` candidates, `E` held-out examples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from schemas.artifacts import CandidateReport, SweepReport
from schemas.config import TrainingConfig
from tasks.training.checkpoints import Progress

_NUM_RESAMPLES = 2000


@dataclass
class Candidate:
    """One of the trainings of a sweep."""

    name: str
    config: TrainingConfig
    seed: int
    progress: Progress = field(default_factory=Progress)
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    """Loss and what it is divided by of each held-out example, [E, 2], of the last evaluation."""

    @property
    def failure(self) -> str:
        """Why it was given up."""
        return self.progress.failure

    @property
    def eval_loss(self) -> float:
        """Of the last evaluation; infinite where it was given up."""
        return math.inf if self.failure or not self.progress.evaluations else self.progress.evaluations[-1].loss


def choose(candidates: Sequence[Candidate]) -> SweepReport:
    """Return which candidate has the smallest held-out loss, and what is left of it after it was chosen."""
    winner = min(candidates, key=lambda candidate: candidate.eval_loss)
    live = [candidate for candidate in candidates if not candidate.failure]
    corrected = None
    if all(len(candidate.losses) for candidate in live):
        corrected = winner.eval_loss + estimate_optimism(np.stack([candidate.losses for candidate in live]))
    return SweepReport(
        winner=winner.name,
        loss=winner.eval_loss,
        corrected_loss=corrected,
        candidates=tuple(
            CandidateReport(
                name=each.name,
                learning_rate=each.config.learning_rate,
                rank=each.config.rank,
                seed=each.seed,
                loss=None if each.failure else each.eval_loss,
                failure=each.failure,
            )
            for each in candidates
        ),
    )


def estimate_optimism(losses: NDArray[np.float64], *, seed: int = 0) -> float:
    """Return by how much the smallest of several held-out losses is expected to be too small, for being the smallest.

    In each resample of the examples the best candidate is chosen again; its loss there is too small by what it has more
    on all examples. The mean over the resamples estimates the same of the choice that was made.

    Args:
        losses: of candidates and examples: sum and divisor, [K, E, 2].
        seed: of the resamples.

    Returns:
        0 for one candidate, and never below.
    """
    num_candidates, num_examples, _ = losses.shape
    if num_candidates < 2 or num_examples < 2:
        return 0.0
    whole = losses[:, :, 0].sum(axis=1) / losses[:, :, 1].sum(axis=1)
    generator = np.random.default_rng(seed)
    gaps = np.empty(_NUM_RESAMPLES)
    for number in range(_NUM_RESAMPLES):
        counts = np.bincount(generator.integers(num_examples, size=num_examples), minlength=num_examples)
        drawn = (losses[:, :, 0] @ counts) / (losses[:, :, 1] @ counts)
        best = int(drawn.argmin())
        gaps[number] = whole[best] - drawn[best]
    return max(0.0, float(gaps.mean()))
