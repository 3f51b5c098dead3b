"""One checkpoint of all candidates of a sweep: they are at the same step, or a kill in between would part them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from tasks.training.checkpoints import (
    Progress,
    Snapshot,
    read_checkpoint,
    read_progress,
    restore_part,
    take_snapshot,
)
from tasks.training.choosing import Candidate
from tasks.training.optimizers import WholeOptimizer

_CANDIDATES = "candidates"


def take_sweep(
    step: int,
    identity: str,
    candidates: Sequence[Candidate],
    parameters: Sequence[Mapping[str, nn.Parameter]],
    optimizers: Sequence[WholeOptimizer],
) -> Snapshot:
    """Copy what a checkpoint of all candidates holds.

    Args:
        step: that they are at; also those that were given up before.
        identity: of the run.
        candidates: with their progress.
        parameters: of each candidate, by name.
        optimizers: of each candidate.
    """
    parts = []
    for own, adamw in zip(parameters, optimizers, strict=True):
        part = take_snapshot(parameters=own, optimizer=adamw.optimizer, progress=Progress(step=step), identity=identity)
        assert part is not None, "a sweep has one process"
        parts.append(part)
    last = parts[-1]  # where there are copies under way, its are done after all others
    content = json.loads(last.content)
    content[_CANDIDATES] = {candidate.name: asdict(candidate.progress) for candidate in candidates}
    return replace(
        last,
        trained={name: tensor for part in parts for name, tensor in part.trained.items()},
        optimizer={name: tensor for part in parts for name, tensor in part.optimizer.items()},
        content=json.dumps(content),
    )


def restore_sweep(
    path: Path,
    candidates: Sequence[Candidate],
    parameters: Sequence[Mapping[str, nn.Parameter]],
    optimizers: Sequence[WholeOptimizer],
) -> int:
    """Put back what is trained, the moments and the progress of every candidate; return the step.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    trained, moments, state = read_checkpoint(path)
    for candidate, own, adamw in zip(candidates, parameters, optimizers, strict=True):
        restore_part(trained, moments, parameters=own, optimizer=adamw.optimizer)
        candidate.progress = read_progress(state[_CANDIDATES][candidate.name])
    return int(state["progress"]["step"])
