"""Weights in 8 or 4 bits, as vLLM reads them: compressed-tensors' packed integers with a scale a row or a group.

Every linear layer of the model is rounded to the nearest of its integers (symmetric, no calibration); embeddings, norms
and the output head stay as they are. The files keep their names and shards, and config.json says how to read them.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from schemas.plurals import count_of
from tasks.exporting.errors import ExportError
from tasks.merging.changes import build_skeleton

GROUPS = (128, 64, 32)
"""Values that share a scale in 4 bits: the largest that divides the inputs of every layer."""
_INDEX = "model.safetensors.index.json"
_PARTS = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class Packing:
    """How weights are packed."""

    bits: int
    group: int | None
    """None: a scale a row."""

    def make_scheme(self) -> Any:
        """Return the library's own words for it."""
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationScheme,
        )

        strategy = "channel" if self.group is None else "group"
        settings: dict[str, Any] = {} if self.group is None else {"group_size": self.group}
        weights = QuantizationArgs(num_bits=self.bits, type="int", symmetric=True, strategy=strategy, **settings)
        return QuantizationScheme(targets=["Linear"], weights=weights)


def write_compressed(parent: Path, folder: Path, bits: int) -> tuple[str, ...]:
    """Write a model's folder with its linear weights packed; return notes.

    Args:
        parent: folder of the model.
        folder: written; there already.
        bits: 8 or 4.

    Raises:
        ExportError: no layer can be packed, or groups do not divide its inputs.
    """
    linear, others = _find_linear(parent)
    packing = Packing(bits, None if bits == 8 else _choose_group(linear))
    scheme, packed = packing.make_scheme(), set[str]()
    weight_map: dict[str, str] = {}
    for file in sorted(parent.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if module in linear and name.endswith(".weight"):
                parts = _pack(module, tensor, packing, scheme)
                tensors |= {f"{module}.{part}": value for part, value in parts.items()}
                packed.add(module)
            else:
                tensors[name] = tensor
        save_file(tensors, folder / file.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    if not packed:
        raise ExportError(f"{parent}: none of its tensors is the weight of a linear layer by itself: nothing to pack")
    _copy_others(parent, folder)
    if (parent / _INDEX).is_file():
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
        (folder / _INDEX).write_text(text + "\n", encoding="utf-8")
    left = sorted({*others, *(set(linear) - packed)})
    _write_config(folder / "config.json", scheme, left)
    kept = [name for name in left if not name.endswith("lm_head")]
    if not kept:
        return ()
    layers = count_of(len(kept), "linear layer stays in its", "linear layers stay in their")
    return (f"{layers} own precision, such as {kept[0]}",)


def unfold_compressed(export: Path, target: Path) -> Path:
    """Write a folder that loads by itself, with the values that an export's packed weights stand for, in fp32.

    Raises:
        ExportError: a packed weight lacks a part.
    """
    from compressed_tensors.compressors.pack_quantized.base import (
        PackedQuantizationCompressor,
    )
    from compressed_tensors.quantization import QuantizationConfig

    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    settings = QuantizationConfig.model_validate(config.pop("quantization_config"))
    (scheme,) = settings.config_groups.values()
    weight_map: dict[str, str] = {}
    for file in sorted(export.glob("*.safetensors")):
        tensors = load_file(file)
        for module in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
            parts = {part: tensors.pop(f"{module}.{part}", None) for part in _PARTS}
            if missing := [part for part, value in parts.items() if value is None]:
                raise ExportError(f"{file}: {module} has no {', '.join(missing)}: write the export anew")
            found = PackedQuantizationCompressor.decompress(parts, scheme)
            tensors[f"{module}.weight"] = found["weight"].float().contiguous()
        save_file(tensors, target / file.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    _copy_others(export, target)
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    if (export / _INDEX).is_file():
        (target / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) + "\n", encoding="utf-8")
    return target


def _find_linear(parent: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the shapes of the linear layers that are packed, by name, and the names of those that are not."""
    skeleton: Any = build_skeleton(parent)
    head = skeleton.get_output_embeddings()
    layers = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    packed = {name: tuple(module.weight.shape) for name, module in layers.items() if module is not head}
    return packed, [name for name in layers if name not in packed]


def _choose_group(linear: dict[str, tuple[int, ...]]) -> int:
    """Return how many values share a scale.

    Raises:
        ExportError: a layer's inputs are divided by none.
    """
    found = next((group for group in GROUPS if all(shape[1] % group == 0 for shape in linear.values())), None)
    if found is None:
        name, shape = next((name, shape) for name, shape in linear.items() if shape[1] % GROUPS[-1])
        raise ExportError(f"{name} has {shape[1]} inputs, no multiple of {GROUPS[-1]}: take the form int8")
    return found


def _pack(name: str, weight: Tensor, packing: Packing, scheme: Any) -> dict[str, Tensor]:
    """Return the parts of a packed weight [outputs, inputs].

    Raises:
        ExportError: read again, a value is more than a step away.
    """
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
    )

    rows = weight.reshape(weight.shape[0], -1, packing.group or weight.shape[1])
    scale, zero = calculate_qparams(rows.amin(dim=-1), rows.amax(dim=-1), scheme.weights)
    given = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    found: dict[str, Tensor] = PackedQuantizationCompressor.compress(given, scheme)
    parts = {part: found[part].contiguous() for part in _PARTS}
    again = PackedQuantizationCompressor.decompress(parts, scheme)["weight"].float().reshape(rows.shape)
    # Half a step for rounding, as much where an end of the range is cut or a scale is rounded to 16 bits.
    steps = (again - rows.float()).abs() / scale.float()[..., None]
    if not float(steps.max()) <= 1.0:
        raise ExportError(f"{name}: a packed value is {float(steps.max()):.2g} steps away: its weights are not finite")
    return parts


def _write_config(file: Path, scheme: Any, ignore: list[str]) -> None:
    """Add to config.json how the weights are read."""
    from compressed_tensors.quantization import QuantizationConfig

    settings = QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", quantization_status="compressed", ignore=ignore
    )
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = settings.model_dump(mode="json", exclude_none=True) | {
        "quant_method": "compressed-tensors"
    }
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_others(source: Path, target: Path) -> None:
    """Copy all files but weights and their index."""
    for path in _list_others(source):
        shutil.copyfile(path, target / path.name)


def _list_others(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name != _INDEX:
            yield path
