"""A base model with what was trained: an adapter on it, or weights of its own in the place of the base's."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.families.files import TRAINED_CONFIG, TRAINED_WEIGHTS
from tasks.merging.changes import Change, MergeError, Replacement, read_adapter_config, read_changes, read_tensors
from tasks.models import load_model


def has_own_weights(folder: Path) -> bool:
    """Say whether a folder holds trained weights of a model, and no adapter."""
    return (folder / TRAINED_CONFIG).is_file()


def read_trained_config(folder: Path) -> dict[str, Any]:
    """Return the description of what was trained, with `method` and `base_model_name_or_path`.

    Raises:
        MergeError: it cannot be read, or describes something else.
    """
    if not has_own_weights(folder):
        return {"method": "lora", **read_adapter_config(folder)}
    path = folder / TRAINED_CONFIG
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        method = values["method"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MergeError(
            f"{path}: cannot be read ({error!r}): the folder that a full training left is wanted"
        ) from error
    if method not in ("full", "freeze"):
        raise MergeError(f"{path}: method is {method!r}: full or freeze is wanted")
    return values


def read_trained_changes(folder: Path, skeleton: nn.Module) -> dict[str, Change]:
    """Return the change of each tensor by its name in the model, of an adapter or of trained weights.

    Args:
        folder: of either.
        skeleton: of `changes.build_skeleton`.

    Raises:
        MergeError: the files cannot be read, or belong to another model.
    """
    if not has_own_weights(folder):
        return read_changes(folder, skeleton)
    read_trained_config(folder)
    tensors = read_tensors(folder / TRAINED_WEIGHTS)
    shapes = {name: tuple(value.shape) for name, value in skeleton.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors.items():
        if shapes.get(name) != tuple(tensor.shape):
            wanted = f"is {list(shapes[name])} in" if name in shapes else "is not in"
            raise MergeError(
                f"{folder}: {name} {list(tensor.shape)} {wanted} this {type(skeleton).__name__}: these weights are of "
                "another model"
            )
    changes: dict[str, Change] = {name: Replacement(tensor) for name, tensor in tensors.items()}
    # Tied tensors are trained as one, and a checkpoint may hold each of them.
    ties: dict[str, str] = getattr(skeleton, "all_tied_weights_keys", {})
    return changes | {name: changes[tied] for name, tied in ties.items() if tied in changes and name not in changes}


def load_trained(base_model: Path, folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Load a base model with an adapter on it (PEFT's), or with trained weights in place of its own.

    Raises:
        ModelError: the base does not load.
        MergeError: the weights do not belong to it.
        Exception: what PEFT raises where the adapter does not.
    """
    model: Any = load_model(base_model, dtype=dtype, device=device)
    if not has_own_weights(folder):
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
        _take_left_out(adapted, folder)
        return adapted
    changes = read_trained_changes(folder, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = changes.get(name)
            if isinstance(change, Replacement):
                parameter.copy_(change.values)
    return model.eval()


@torch.no_grad()
def _take_left_out(adapted: Any, folder: Path) -> None:
    """Copy the matrices that PEFT has left as they begin, with nothing but a warning.

    It renames those of some families while it loads them, as transformers does with the weights of older checkpoints,
    and then takes a matrix for another one. The file has them by their names in the model.
    """
    held = {name.replace(".default.", "."): value for name, value in adapted.named_parameters() if ".lora_" in name}
    tensors = read_tensors(folder / "adapter_model.safetensors")
    for name, value in tensors.items():
        if ".lora_B." not in name or name not in held or held[name].shape != value.shape:
            continue
        first = name.replace(".lora_B.", ".lora_A.")
        if bool(value.any()) and not bool(held[name].any()) and first in held:
            held[name].copy_(value)
            held[first].copy_(tensors[first])
