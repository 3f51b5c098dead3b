"""Training without an adapter: the model's own weights, all of the text decoder's or its last layers.

What is trained is fp32 whatever the base's dtype, and computes in 16-bit products where the config says so (autocast):
AdamW's small updates would be lost in 16-bit weights. What stays frozen lies in the precision of the training.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from schemas.config import TrainingConfig
from tasks.families.classes import FamilyError
from tasks.families.files import TRAINED_CONFIG, TRAINED_WEIGHTS
from tasks.families.selection import SelectedWeight, select_weights
from tasks.training.adamw import count_moment_bytes
from tasks.training.checkpoints import publish_folder
from tasks.training.records import TrainingError

HIGH_LEARNING_RATE = 5e-5
"""Above it, a pretrained model forgets quickly (our choice; 1e-4 is usual for LoRA)."""


def plan_weights(model: Any, config: TrainingConfig) -> tuple[SelectedWeight, ...]:
    """Decide for each parameter whether it is trained.

    Args:
        model: with or without values (meta device).
        config: the training section.

    Raises:
        TrainingError: a named module is not in the model, or the model has fewer layers.
    """
    num_layers = None if config.method == "full" else config.trained_layers
    try:
        return select_weights(model, num_layers=num_layers, modules=config.trained_modules)
    except FamilyError as error:
        raise TrainingError(str(error)) from error


def choose_weights(model: Any, config: TrainingConfig, *, dtype: torch.dtype) -> Any:
    """Make what is trained fp32 with a gradient, and all else frozen in `dtype`; return the model."""
    trained = {weight.name for weight in plan_weights(model, config) if not weight.skipped}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.data = parameter.data.to(torch.float32 if name in trained else dtype)
    return model


def save_weights(model: Any, config: TrainingConfig, folder: Path, trained: Mapping[str, Tensor]) -> Path:
    """Write the trained weights (fp32 safetensors) by their names in the model, whole or not at all.

    Args:
        model: names its base.
        config: the training section.
        folder: is replaced where there is one.
        trained: values by the names of `collect_trained`.
    """
    partial = folder.parent / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in trained.items()}
    save_file(tensors, partial / TRAINED_WEIGHTS)
    values = {
        "method": config.method,
        "base_model_name_or_path": model.name_or_path,
        "num_values": sum(tensor.numel() for tensor in tensors.values()),
    }
    (partial / TRAINED_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    publish_folder(partial, folder)
    return folder


def advise_learning_rate(config: TrainingConfig) -> str:
    """Return a sentence where the learning rate is LoRA's and all weights are trained; else nothing."""
    if config.is_lora or config.learning_rate <= HIGH_LEARNING_RATE:
        return ""
    return (
        f"training.learning_rate is {config.learning_rate:g} with method {config.method}: that is a rate for LoRA; "
        "with the model's own weights 1e-5 to 5e-5 is usual, and more makes it forget"
    )


def describe_cost(trained: Mapping[str, nn.Parameter], config: TrainingConfig, *, copy_bytes: int = 0) -> str:
    """Say what trained weights take: in memory, and on the disk for each checkpoint.

    Args:
        trained: by name.
        config: of the training.
        copy_bytes: of the working copy of each value that the engine holds.
    """
    count, moments = sum(parameter.numel() for parameter in trained.values()), count_moment_bytes(config)
    copies = ", AdamW's moments and a 16-bit copy" if copy_bytes else " and AdamW's moments"
    return (
        f"{count:,} values are trained in fp32: {(8 + moments + copy_bytes) * count / 2**30:.2f} GiB with their "
        f"gradient{copies}, {(4 + moments) * count / 2**30:.2f} GiB on the disk for each checkpoint"
    )
