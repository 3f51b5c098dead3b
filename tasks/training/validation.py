"""The loss on the held-out examples on the way, and what its curve says: best step, when to stop, over-fitting."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tasks.training.distributed import keep_pace
from tasks.training.engines.engine import Engine
from tasks.training.objective import Objective
from tasks.training.records import EvalRecord
from tasks.training.token_table import TokenTable

# Two rises of the evaluation loss within noise are no over-fitting: together they must be at least this part of it.
MIN_RISE = 0.01
# Our choice: four evaluations in a row, over which the gap grows by a fifth of the loss.
MIN_BEHIND = 4
MIN_GAP = 0.2


def sum_held_out(
    model: nn.Module, engine: Engine, table: TokenTable, objective: Objective, *, is_even: bool = False
) -> NDArray[np.float64]:
    """Return the objective's sum over the held-out examples, what that is divided by, and the sums of its figures.

    The model is in eval mode meanwhile: no dropout, so no random number is drawn and training goes on undisturbed.
    Of an objective without figures these are -log p of the tokens, each alike, and their number.

    Args:
        model: that the engine computes with.
        engine: of the training.
        table: the examples, this rank's share of them.
        objective: whose sums are wanted.
        is_even: every rank does as many passes; see `distributed.keep_pace`.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(1 + len(objective.figures), dtype=torch.float64, device=engine.device)
    count = 0.0
    with torch.no_grad():
        for whole, counts in keep_pace(engine.form_evaluation(table), is_even=is_even):
            batch = engine.take_part(whole)
            if objective.sum_figures is None:
                sums[0] += counts * engine.sum_losses(batch)
                count += counts * batch.num_trained_tokens
                continue
            log_probs = engine.compute_log_probs(batch)
            sums[0] += counts * objective.sum_losses(log_probs, batch)
            sums[1:] += counts * objective.sum_figures(log_probs, batch)
            count += counts * objective.count(batch)
    model.train(was_training)
    total, *figures = sums.tolist()
    return np.array([total, count, *figures])


def count_evals_since_best(evaluations: Sequence[EvalRecord]) -> int:
    """Return how many evaluations came after the best one; 0 when the last is the best, or there is none."""
    best = max((i for i, record in enumerate(evaluations) if record.is_best), default=len(evaluations) - 1)
    return len(evaluations) - 1 - best if evaluations else 0


def find_overfitting(evaluations: Sequence[EvalRecord]) -> str | None:
    """Return a warning when the training loss falls while the evaluation loss rises, or stays behind for long.

    It rises: twice in a row, together by MIN_RISE of the loss that they start from. It stays behind: over
    MIN_BEHIND evaluations in a row the gap between the two widens each time, together by MIN_GAP of that loss,
    which does not fall by MIN_RISE meanwhile.
    """
    advice = "train for fewer epochs, give more data, lower the rank, or set training.early_stopping_patience"
    for first, second, third in zip(evaluations, evaluations[1:], evaluations[2:], strict=False):
        rises = first.loss < second.loss < third.loss and third.loss - first.loss >= MIN_RISE * first.loss
        if rises and first.train_loss > second.train_loss > third.train_loss:
            return (
                f"over-fitting: from step {first.step} to {third.step} the held-out loss rose from {first.loss:.4f} to "
                f"{third.loss:.4f} while the training loss fell from {first.train_loss:.4f} to {third.train_loss:.4f}: "
                f"{advice}"
            )
    for start in range(len(evaluations) - MIN_BEHIND):
        window = evaluations[start : start + MIN_BEHIND + 1]
        first, last = window[0], window[-1]
        gaps = [record.loss - record.train_loss for record in window]
        widens = all(gap < wider for gap, wider in pairwise(gaps)) and gaps[-1] - gaps[0] >= MIN_GAP * last.loss
        if widens and first.loss - last.loss < MIN_RISE * first.loss:
            return (
                f"over-fitting: from step {first.step} to {last.step} the training loss fell from "
                f"{first.train_loss:.4f} to {last.train_loss:.4f}, and the held-out loss from {first.loss:.4f} only to "
                f"{last.loss:.4f}: {advice}"
            )
    return None
