"""The loss of each held-out example under each candidate of a sweep.

Dimensions: `E` held-out examples, or pairs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.batches import Batch
from tasks.training.engines.side_by_side import LaneEngine
from tasks.training.objective import Objective
from tasks.training.token_table import TokenTable


@torch.no_grad()
def compute_held_out(
    model: nn.Module, lanes: LaneEngine, objective: Objective, table: TokenTable, is_live: Sequence[bool]
) -> list[NDArray[np.float64] | None]:
    """Return of each candidate loss and divisor of each example, [E, 2]; nothing of one that was given up.

    Args:
        model: with all adapters.
        lanes: that compute with it.
        objective: whose losses are wanted.
        table: of the held-out examples.
        is_live: of each candidate, whether it was not given up.
    """
    found = [np.zeros((len(table.group_lengths), 2)) if live else None for live in is_live]
    was_training = model.training
    model.eval()
    for batch in lanes.form_evaluation(table):
        log_probs = lanes.compute_log_probs([batch if live else None for live in is_live])
        for sums, own in zip(found, log_probs, strict=True):
            if sums is not None:
                np.add.at(sums, *_list_losses(objective, own, batch, table.group))
    model.train(was_training)
    return found


def _list_losses(
    objective: Objective, log_probs: Tensor, batch: Batch, group: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the numbers of a batch's examples, or pairs, and loss and divisor of each [., 2]."""
    numbers = np.array(batch.indices[::group]) // group
    if objective.list_losses is not None:
        losses = objective.list_losses(log_probs, batch).double().cpu().numpy()
        return numbers, np.stack([losses, np.ones_like(losses)], axis=1)
    assert batch.segments is not None
    assert batch.trained is not None
    # The last segment may be padding, of which nothing is trained.
    owners = np.repeat(np.arange(len(batch.segments.lengths)), batch.segments.lengths)[batch.trained.numpy()]
    is_trained = batch.choose(batch.targets).numpy() != IGNORE_INDEX
    values = np.stack([-log_probs.double().cpu().numpy(), np.ones(len(owners))], axis=1)[is_trained]
    sums = np.zeros((len(batch.segments.lengths), 2))
    np.add.at(sums, owners[is_trained], values)
    return numbers, sums[: len(numbers)]
