"""Which models can be written as GGUF, and what of theirs is named or laid out otherwise there.

The `gguf` package has the names of tensors. llama.cpp rotates pairs of neighbouring channels for the architecture
`llama`, transformers pairs of a head's two halves: the rows of queries and keys change places (llama.cpp,
convert_hf_to_gguf.py, LlamaModel.permute). The Qwens keep the halves.
"""

from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tasks.exporting.errors import ExportError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""Of `model_type`. Experts, windows, scaled rotations and images are laid out otherwise and not among them."""


def check_family(config: dict[str, Any]) -> gguf.MODEL_ARCH:
    """Return GGUF's architecture of a config.json.

    Raises:
        ExportError: it would be another model there.
    """
    kind = str(config.get("model_type", ""))
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"a model of the family {kind or '(none named)'} is not written as GGUF here, only "
            f"{', '.join(ARCHITECTURES)}: llama.cpp's convert_hf_to_gguf.py may do it: it wants the model's folder"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turn = rope.get("rope_type", rope.get("type", "default"))
    if turn != "default":
        raise ExportError(f"rotary positions of the type {turn} are not written as GGUF here, only the default ones")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", kind == "mistral"):
        raise ExportError(f"a sliding window of {window} tokens is not kept by llama.cpp for this family")
    return ARCHITECTURES[kind]


def find_rope_theta(config: dict[str, Any]) -> float:
    """Return the base of the rotations."""
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def count_heads(name: str, arch: gguf.MODEL_ARCH, config: dict[str, Any]) -> int | None:
    """Return the heads whose rows change places in a tensor; None for one that stays as it is."""
    if arch != gguf.MODEL_ARCH.LLAMA:
        return None
    heads = int(config["num_attention_heads"])
    if ".q_proj." in name:
        return heads
    return int(config.get("num_key_value_heads") or heads) if ".k_proj." in name else None


def interleave(values: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Put the rows of each head's halves next to each other: 0, d/2, 1, d/2 + 1 and so on."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def separate(values: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Undo `interleave`."""
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
