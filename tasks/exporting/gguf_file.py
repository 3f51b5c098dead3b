"""A model's folder as one GGUF file, and back: every tensor is written, read again and compared.

Vectors stay fp32, as llama.cpp has them; matrices take the type that was asked for, embedding and head at least 8 bits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from tasks.exporting.errors import ExportError
from tasks.exporting.gguf_names import check_family, count_heads, find_rope_theta, interleave, separate
from tasks.exporting.gguf_tokenizer import add_tokenizer
from tasks.exporting.stops import read_stops

TYPES = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
"""Of matrices, and of the whole file."""
_PART_OF_LARGEST = {Kind.F32: 0.0, Kind.F16: 2**-11, Kind.BF16: 2**-8, Kind.Q8_0: 0.6 / 127, Kind.Q4_0: 1.1 / 8}
"""The largest error of a value, by the largest value of its row: of a float half a unit, of q8_0 half a step and the
rounding of its scale, of q4_0 a step, as its scale has the sign of the largest value (ggml-quants.c)."""
_FEWEST = 1e-7


def write_gguf(folder: Path, path: Path, kind: str, *, name: str) -> int:
    """Write a model; return the number of its tensors.

    Args:
        folder: config.json, safetensors, tokenizer.
        path: of the file.
        kind: of TYPES.
        name: of the model, in the file.

    Raises:
        ExportError: the family, the tokenizer or a tensor cannot be written, or what was written is something else.
    """
    config = _read_config(folder)
    arch = check_family(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    writer.add_name(name)
    writer.add_file_type(TYPES[kind][1])
    _add_sizes(writer, config)
    add_tokenizer(writer, folder, num_rows=int(config["vocab_size"]), stops=read_stops(folder))
    names = _map_names(folder, arch, config)
    for tensor, values in _read_tensors(folder):
        if (heads := count_heads(tensor, arch, config)) is not None:
            values = interleave(values, heads)
        chosen = _choose_kind(names[tensor], values, TYPES[kind][0])
        writer.add_tensor(names[tensor], gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_file(folder, path)
    return len(names)


def check_file(folder: Path, path: Path) -> None:
    """Compare every tensor of a file with the model's.

    Raises:
        ExportError: one is missing, is another's, or is further from the model's than its type's rounding.
    """
    found = read_gguf(folder, path)
    for tensor, values in _read_tensors(folder):
        if tensor not in found:
            raise ExportError(f"{path}: {tensor} is missing")
        kind, read = found.pop(tensor)
        if read.shape != values.shape:
            raise ExportError(f"{path}: {tensor} has the shape {read.shape}, and the model's has {values.shape}")
        largest = np.abs(values).max(axis=-1, keepdims=True, initial=0.0)
        if not (np.abs(read - values) <= _PART_OF_LARGEST[kind] * largest + _FEWEST).all():
            raise ExportError(f"{path}: {tensor} is not the model's within the rounding of {kind.name}")
    if found:
        raise ExportError(f"{path}: it has tensors that the model has not: {', '.join(sorted(found))}")


def read_gguf(folder: Path, path: Path) -> dict[str, tuple[Kind, NDArray[np.float32]]]:
    """Return each tensor of a file by the model's own name, as the values that its codes stand for."""
    config = _read_config(folder)
    arch = check_family(config)
    models = {written: own for own, written in _map_names(folder, arch, config).items()}
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = models.get(tensor.name, tensor.name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape(tuple(int(size) for size in reversed(tensor.shape)))
        if (heads := count_heads(name, arch, config)) is not None:
            values = separate(values, heads)
        found[name] = (tensor.tensor_type, values)
    return found


def unfold(folder: Path, path: Path, target: Path) -> None:
    """Write the values of a file as a model's folder (fp32), so that what evaluates the parent evaluates them.

    Args:
        folder: of the parent; all but its weights is copied.
        path: of the file.
        target: a new folder.
    """
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            (target / file.name).write_bytes(file.read_bytes())
    config = {**_read_config(folder), "dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: values for name, (_, values) in read_gguf(folder, path).items()}, target / "model.safetensors")


def _read_config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(find_rope_theta(config))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))


def _map_names(folder: Path, arch: gguf.MODEL_ARCH, config: dict[str, Any]) -> dict[str, str]:
    """Return GGUF's name of every tensor of the model's files.

    Raises:
        ExportError: one has none: it would be lost.
    """
    known = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    names = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in _list_tensors(folder)}
    if unknown := sorted(name for name, found in names.items() if found is None):
        raise ExportError(f"{folder}: GGUF has no place for {', '.join(unknown[:8])}: the model would not be whole")
    return {name: str(found) for name, found in names.items()}


def _list_tensors(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            yield from tensors.keys()


def _read_tensors(folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                yield name, tensors.get_tensor(name).float().numpy()


def _choose_kind(name: str, values: NDArray[Any], wanted: Kind) -> Kind:
    """Return the type of a tensor: rows that are no whole blocks cannot be quantized and become f16."""
    if values.ndim == 1:
        return Kind.F32
    if wanted == Kind.Q4_0 and name.startswith(("token_embd", "output")):
        wanted = Kind.Q8_0
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if values.shape[-1] % block == 0 else Kind.F16
