"""What an adapter does to the base's tensors: low-rank additions and replacements, by tensor name.

Only plain LoRA can be told from the files alone; whatever else PEFT can do is left to PEFT.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tasks.families.classes import choose_class, read_config


class MergeError(ValueError):
    """The adapter cannot be merged into this base model; the message says where and why."""


@dataclass(frozen=True)
class LowRank:
    """weight + scale * b @ a, with a [r, in] and b [out, r]."""

    a: Tensor
    b: Tensor
    scale: float

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        """Change some rows: compute in fp32 and cast once, to the weight's own dtype."""
        wide = weight.to(torch.float32, copy=True)
        return wide.addmm_(self.b[rows].float(), self.a.float(), alpha=self.scale).to(weight.dtype)


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained in full."""

    values: Tensor

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        """Change some rows: cast once, to the weight's own dtype."""
        return (self.values[rows] if self.values.dim() else self.values).to(weight.dtype)


Change = LowRank | Replacement

# Settings that either enter the formula above or end with the training; any other that is set needs PEFT itself.
_PLAIN_SETTINGS = frozenset(
    {
        "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
        "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
        "inference_mode", "layers_to_transform", "layers_pattern", "ensure_weight_tying", "runtime_config",
    }
)  # fmt: skip


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        MergeError: it is missing, or not a LoRA adapter's.
    """
    path = adapter / "adapter_config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MergeError(f"{path}: cannot be read ({error}): the folder of a LoRA adapter is wanted") from error
    if values.get("peft_type") != "LORA":
        raise MergeError(f"{path}: peft_type is {values.get('peft_type')!r}: only LORA adapters can be merged")
    return values


def read_changes(adapter: Path, base_model: Path) -> dict[str, Change] | None:
    """Return the change of each tensor by its name in the model, or None when only PEFT knows how to merge.

    Raises:
        MergeError: the adapter's files cannot be read, or it holds nothing.
    """
    settings = read_adapter_config(adapter)
    tensors = _read_adapter_tensors(adapter)
    if not _is_plain(settings):
        return None
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    modules = dict(build_skeleton(base_model).named_modules())
    changes: dict[str, Change] = {}
    for key in sorted(tensors):
        path, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
        if not kind:
            changes[path] = Replacement(tensors[key])
            continue
        partner = key.replace(".lora_A.weight", ".lora_B.weight")
        if kind not in ("A.weight", "B.weight") or partner not in tensors or type(modules.get(path)) is not nn.Linear:
            return None
        if kind == "A.weight":
            changes[f"{path}.weight"] = LowRank(tensors[key], tensors[partner], scale)
    return changes


def build_skeleton(base_model: Path) -> nn.Module:
    """Build the model without weights (on the meta device), to ask it for names, layer types and ties."""
    try:
        config = read_config(base_model)
        with torch.device("meta"):
            skeleton: nn.Module = choose_class(config, base_model)._from_config(config)
    except Exception as error:
        raise MergeError(f"{base_model}: no language model is described here ({error})") from error
    return skeleton


def _read_adapter_tensors(adapter: Path) -> dict[str, Tensor]:
    """Read the adapter's weights and refuse empty or broken ones."""
    path = adapter / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MergeError(f"{path}: cannot be read ({error}): weights as safetensors are wanted") from error
    if not tensors:
        raise MergeError(f"{path}: holds no tensors: there is nothing to merge")
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise MergeError(f"{path}: NaN or infinity in {len(broken)} tensor(s), such as {broken[0]}: train again")
    return tensors


def _is_plain(settings: dict[str, Any]) -> bool:
    """Say whether every other setting is at PEFT's default; how A and B started does not matter unless W moved too."""
    defaults = LoraConfig().to_dict()
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        return False
    others = settings.keys() - _PLAIN_SETTINGS - {"init_lora_weights"}
    # PEFT writes an empty list or map where it found nothing to say: it means what None does.
    return all(name in defaults and (settings[name] or None) == (defaults[name] or None) for name in others)
