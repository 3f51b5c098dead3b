"""What is trained, by `training.method`: an adapter beside the frozen model, or the model's own weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from schemas.artifacts import AdaptedWeights
from schemas.config import TrainingConfig
from tasks.families.adaptation import describe, summarize
from tasks.families.selection import describe_selection, summarize_selection
from tasks.training.lora import attach_adapter, collect_trained, plan_adapter, save_adapter
from tasks.training.own_weights import choose_weights, plan_weights, save_weights

ADAPTER, WEIGHTS = "adapter", "trained_weights"


def attach_trained(model: Any, config: TrainingConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Freeze what is not trained, and return the model with what is, fp32 with a gradient.

    Args:
        model: the base, as `frozen.load_base` gives it.
        config: the training section.
        seed: of an adapter's start.
        dtype: of the frozen weights where there is no adapter.

    Raises:
        TrainingError: a setting does not go with this model.
    """
    return attach_adapter(model, config, seed=seed) if config.is_lora else choose_weights(model, config, dtype=dtype)


def count_trained(model: Any, config: TrainingConfig) -> tuple[AdaptedWeights, ...]:
    """Return which of a base's weights an adapter stands beside, or are trained themselves, by kind."""
    if config.is_lora:
        return summarize(plan_adapter(model, config))
    return summarize_selection(plan_weights(model, config))


def describe_trained(rows: Sequence[AdaptedWeights], config: TrainingConfig) -> list[str]:
    """Return the lines for the log: how much is trained, and what is not and why."""
    first = describe(rows) if config.is_lora else describe_selection(rows)
    word = "Not adapted" if config.is_lora else "Not trained"
    return [first, *(f"{word}: {line}" for row in rows for line in row.skipped)]


def name_trained_folder(run_folder: Path, config: TrainingConfig) -> Path:
    """Return the folder of a run that gets what was trained."""
    return run_folder / (ADAPTER if config.is_lora else WEIGHTS)


def save_trained(model: Any, config: TrainingConfig, folder: Path, trained: Mapping[str, Tensor] | None = None) -> Path:
    """Write what was trained, whole or not at all; return the folder.

    Args:
        model: of `attach_trained`.
        config: the training section.
        folder: is replaced where there is one.
        trained: values by the names of `collect_trained`; those that the model holds when None.
    """
    if config.is_lora:
        return save_adapter(model, folder, trained)
    return save_weights(model, config, folder, collect_trained(model) if trained is None else trained)


def find_base(model: Any) -> Any:
    """Return the model of transformers in what `attach_trained` returned."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
