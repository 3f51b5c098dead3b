"""Checks that a base model and a training's settings fit, before anything is read, evaluated or trained."""

from pathlib import Path

from schemas.config import TrainingConfig
from tasks.families.reading import check_reads_text
from tasks.families.registry import explain_refused
from tasks.merging.changes import build_skeleton
from tasks.merging.names import check_layout
from tasks.merging.shards import read_headers
from tasks.training.lora import plan_adapter
from tasks.training.own_weights import advise_learning_rate, plan_weights


def check_model(folder: Path, config: TrainingConfig) -> tuple[str, ...]:
    """Refuse what the training or the merge would refuse hours later; return what a person should think about.

    Args:
        folder: of the base model.
        config: the training section.

    Raises:
        MergeError: no language model is described there, or its files cannot be merged into.
        FamilyError: the model wants more than text.
        TrainingError: a setting does not go with this model; the message says what would do.
    """
    skeleton = build_skeleton(folder)
    if not explain_refused(skeleton.config):  # whose reason says more
        check_reads_text(skeleton)
    if config.is_lora:
        adapted = {weight.name: weight.shape for weight in plan_adapter(skeleton, config).adapted}
        check_layout(skeleton, read_headers(folder), adapted)
        return ()
    trained = {weight.name: weight.shape for weight in plan_weights(skeleton, config) if not weight.skipped}
    check_layout(skeleton, read_headers(folder), trained, is_whole=True)
    return tuple(filter(None, (advise_learning_rate(config),)))
