"""What an adapter does to the base's tensors: low-rank additions and replacements, by tensor name.

PEFT itself says which matrices belong to which weight and by what they are scaled: the adapter's config is attached to
the model without values (meta device). The values come from the adapter's file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import Embedding, Linear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.plurals import count_of
from tasks.families.classes import FamilyError, choose_class, read_config
from tasks.families.reading import let_read_text

_PREFIX = "base_model.model."
_STACK = 3
"""Dimensions of a weight that holds a matrix for each expert."""


class MergeError(ValueError):
    """The adapter cannot be merged into this base model; the message says where and why."""


@dataclass(frozen=True)
class LowRank:
    """weight + scale * b @ a, with a [r, in] and b [out, r]; or of E experts, with a [E, r, in] and b [E, out, r]."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    """[out]: the length that DoRA gives each row of the sum (Liu et al., 2024, equation 5)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    @property
    def is_zero(self) -> bool:
        """Say whether it changes nothing, as before the first step."""
        return self.magnitude is None and not bool(self.b.any() and self.a.any())

    def apply(self, weight: Tensor, rows: slice | Tensor) -> Tensor:
        """Change some rows, or some experts: compute in fp32 and cast once, to the weight's own dtype."""
        wide = weight.to(torch.float32, copy=True)
        if wide.dim() == _STACK:
            return wide.baddbmm_(self.b[rows].float(), self.a[rows].float(), alpha=self.scale).to(weight.dtype)
        wide.addmm_(self.b[rows].float(), self.a.float(), alpha=self.scale)
        if self.magnitude is not None:
            wide.mul_(self.magnitude[rows].float().div(wide.norm(dim=1)).unsqueeze(1))
        return wide.to(weight.dtype)

    def transpose(self) -> "LowRank":
        """Return the change of the transposed weight, or of each expert's."""
        self._refuse_magnitude()
        return replace(self, a=self.b.mT, b=self.a.mT)

    def split(self, sizes: Sequence[int], *, dim: int) -> "list[LowRank]":
        """Return the changes of a weight's parts: of its rows (dim -2) or its columns (dim -1)."""
        self._refuse_magnitude()
        if dim == -2:
            return [replace(self, b=part) for part in self.b.split(list(sizes), dim=-2)]
        return [replace(self, a=part) for part in self.a.split(list(sizes), dim=-1)]

    def unstack(self) -> "list[LowRank]":
        """Return the change of each expert's weight."""
        return [replace(self, a=a, b=b) for a, b in zip(self.a, self.b, strict=True)]

    def _refuse_magnitude(self) -> None:
        if self.magnitude is not None:
            raise MergeError(
                "DoRA's magnitudes cannot be divided as the base model's files are: train without use_dora"
            )


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained in full."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.values.shape)

    @property
    def is_zero(self) -> bool:
        """Whether it changes anything is not known without the base's values."""
        return False

    def apply(self, weight: Tensor, rows: slice | Tensor) -> Tensor:
        """Change some rows: cast once, to the weight's own dtype."""
        return (self.values[rows] if self.values.dim() else self.values).to(weight.dtype)

    def transpose(self) -> "Replacement":
        """Return the transposed values."""
        return Replacement(self.values.mT)

    def split(self, sizes: Sequence[int], *, dim: int) -> "list[Replacement]":
        """Return the values of rows (dim -2) or columns (dim -1)."""
        return [Replacement(part) for part in self.values.split(list(sizes), dim=dim)]

    def unstack(self) -> "list[Replacement]":
        """Return the values of each expert."""
        return [Replacement(values) for values in self.values]


Change = LowRank | Replacement


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
    start = values.get("init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        raise MergeError(
            f"{path}: init_lora_weights is {start!r}, which moves the base's weights too: only an adapter whose base "
            "stays as it is can be merged"
        )
    return values


def read_changes(adapter: Path, skeleton: nn.Module) -> dict[str, Change]:
    """Return the change of each tensor by its name in the model.

    Args:
        adapter: folder in PEFT's format.
        skeleton: of `build_skeleton`; a skeleton of its adapter is attached to it.

    Raises:
        MergeError: the adapter's files cannot be read, it holds nothing, or its matrices are not those of its config.
    """
    read_adapter_config(adapter)
    tensors = read_tensors(adapter / "adapter_model.safetensors")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        with torch.device("meta"):
            attached: Any = PeftModel(skeleton, config, low_cpu_mem_usage=True)
    except Exception as error:
        raise MergeError(f"{adapter}: PEFT cannot attach this adapter to its base model ({error})") from error
    changes: dict[str, Change] = {}
    for path, module in attached.named_modules():
        if isinstance(module, LoraLayer):
            changes.update(_read_layer(adapter, path, module, tensors))
    changes.update({name.removeprefix(_PREFIX): Replacement(tensors.pop(name)) for name in _find_whole(tensors)})
    if tensors:
        raise MergeError(
            f"{adapter}: {len(tensors)} matrices, such as {next(iter(tensors))}, belong to no weight of the base "
            "model: this adapter was trained on another base model"
        )
    return changes


def build_skeleton(base_model: Path) -> PreTrainedModel:
    """Build the model without weights (on the meta device), to ask it for names, layer types and ties."""
    try:
        config = read_config(base_model)
        with torch.device("meta"):
            skeleton: PreTrainedModel = choose_class(config, base_model)._from_config(config)
    except FamilyError as error:
        raise MergeError(str(error)) from error
    except ImportError as error:  # of timm, which some image parts want
        raise MergeError(
            f"{base_model}: {config.model_type} needs a package that is not installed here "
            f"({' '.join(str(error).split())})"
        ) from error
    except Exception as error:
        raise MergeError(f"{base_model}: no language model is described here ({error})") from error
    let_read_text(skeleton)
    return skeleton


def _read_layer(adapter: Path, path: str, module: Any, tensors: dict[str, Tensor]) -> dict[str, Change]:
    """Take a layer's matrices out of the adapter's tensors, and return its change."""
    name = f"{path.removeprefix(_PREFIX).replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
    scale = float(module.scaling["default"])
    if isinstance(module, Embedding):
        a, b = (_take(adapter, tensors, f"{path}.lora_embedding_{letter}") for letter in "AB")
        return {name: LowRank(a, b, scale).transpose()}
    a, b = (_take(adapter, tensors, f"{path}.lora_{letter}.weight") for letter in "AB")
    for found, wanted in ((a, module.lora_A), (b, module.lora_B)):
        if found.shape != wanted["default"].weight.shape:
            raise MergeError(
                f"{name}: the adapter's shape is {[b.shape[0], a.shape[1]]} with matrices {list(a.shape)} and "
                f"{list(b.shape)}, but the base model's is {list(_shape_of(module))}: this adapter was trained on "
                "another base model"
            )
    if isinstance(module, ParamWrapper):
        if module.get_param().dim() == _STACK:
            a = a.reshape(module.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, module.num_experts).permute(2, 0, 1)
            is_transposed = bool(getattr(module.get_base_layer(), "is_transposed", False))
            return {name: LowRank(a, b, scale).transpose() if is_transposed else LowRank(a, b, scale)}
        return {name: LowRank(a, b, scale)}
    if not isinstance(module, Linear):
        raise MergeError(
            f"{adapter}: {name} is a {type(module).__name__}: only adapters of linear layers can be merged"
        )
    magnitude = _take(adapter, tensors, f"{path}.lora_magnitude_vector") if module.use_dora["default"] else None
    change = LowRank(a, b, scale, magnitude)
    return {name: change.transpose() if module.fan_in_fan_out else change}


def _shape_of(module: Any) -> tuple[int, ...]:
    """Return the shape of the weight that a layer adapts."""
    weight = module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
    return tuple(weight.shape)


def _take(adapter: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    """Take a tensor out."""
    if name not in tensors:
        raise MergeError(
            f"{adapter}: {name} is missing: the adapter's config names weights that its file has no matrices of"
        )
    return tensors.pop(name)


def _find_whole(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that were trained in full."""
    return [name for name in tensors if ".lora_" not in name]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read trained weights and refuse empty or broken ones.

    Raises:
        MergeError: no safetensors there, none in it, or NaN or infinity.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MergeError(f"{path}: cannot be read ({error}): weights as safetensors are wanted") from error
    if not tensors:
        raise MergeError(f"{path}: holds no tensors: there is nothing to merge")
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise MergeError(
            f"{path}: NaN or infinity in {count_of(len(broken), 'tensor')}, such as {broken[0]}: train again"
        )
    return tensors
