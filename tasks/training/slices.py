"""A rank's slice of a flat batch whose tokens several ranks share; see `engines.shared_tokens`."""

from dataclasses import replace

import numpy as np
import torch

from tasks.decoder.attention import Segments
from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.batches import FLAT_MULTIPLE, Batch


def take_slice(batch: Batch, number: int, size: int) -> Batch:
    """Return one rank's slice of a flat batch; its segments stay those of the whole.

    Padding fills the batch up so that all slices are as long, of a round number of tokens.

    Args:
        batch: on the host.
        number: of the rank in its group.
        size: of the group.
    """
    assert batch.segments is not None
    assert batch.trained is not None
    assert batch.position_ids is not None
    missing = -batch.input_ids.shape[1] % (size * FLAT_MULTIPLE)
    fill = torch.nn.functional.pad
    length = (batch.input_ids.shape[1] + missing) // size
    span = slice(number * length, (number + 1) * length)
    targets = fill(batch.targets, (0, missing), value=IGNORE_INDEX)[:, span].contiguous()
    positions = torch.cat([batch.position_ids, torch.arange(missing)[None]], dim=1)[:, span].contiguous()
    counts = targets != IGNORE_INDEX
    weights = None if batch.weights is None else fill(batch.weights, (0, missing))[:, span].contiguous()
    return replace(
        batch,
        input_ids=fill(batch.input_ids, (0, missing))[:, span].contiguous(),
        targets=targets,
        position_ids=positions,
        segments=_fill_up(batch.segments, missing),
        trained=_choose_rows(targets[0]),
        num_tokens=max(0, min(batch.num_tokens, span.stop) - span.start),
        num_trained_tokens=int(counts.sum()),
        dropout_key=batch.dropout_key ^ number,  # masks go by the row: each slice's are others
        weights=weights,
        total_weight=0.0 if weights is None else float(weights[counts].double().sum()),
    )


def _fill_up(segments: Segments, missing: int) -> Segments:
    """Return segments with so many tokens of padding as a further one."""
    if not missing:
        return segments
    end = segments.borders[-1:] + missing
    return Segments(torch.cat([segments.borders, end]), (*segments.lengths, missing))


def _choose_rows(targets: torch.Tensor) -> torch.Tensor:
    """Return the trained positions [N], and some that are not, up to a round number and at least one."""
    counts = targets.numpy() != IGNORE_INDEX
    trained = np.flatnonzero(counts)
    num_others = -len(trained) % FLAT_MULTIPLE if len(trained) else FLAT_MULTIPLE
    others = np.flatnonzero(~counts)[:num_others]
    return torch.from_numpy(np.sort(np.concatenate([trained, others])))
