"""Checks that a base model and a training's settings fit, before anything is read, evaluated or trained."""

from pathlib import Path

from schemas.config import TrainingConfig
from tasks.merging.changes import build_skeleton
from tasks.merging.names import check_layout
from tasks.merging.shards import read_headers
from tasks.training.lora import plan_adapter


def check_model(folder: Path, config: TrainingConfig) -> None:
    """Refuse what the training or the merge would refuse hours later.

    Args:
        folder: of the base model.
        config: the training section.

    Raises:
        MergeError: no language model is described there, or its files cannot be merged into.
        TrainingError: a setting does not go with this model; the message says what would do.
    """
    skeleton = build_skeleton(folder)
    plan = plan_adapter(skeleton, config)
    check_layout(skeleton, read_headers(folder), {weight.name: weight.shape for weight in plan.adapted})
