"""The decoder's operations in plain PyTorch with their float8 copies: what the kernels make on a GPU, on a CPU."""

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tasks.decoder import elementwise

# Where the room for the float8 copy is among the arguments, and where what it is a copy of.
_PLACES = {"add_norm": (5, 4), "norm_backward": (6, 5), "gate": (3, 2), "gate_backward": (4, 3)}


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [T, H] in float8 and the scale of each row [T, 1]."""
    scales = (values.float().abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-12)
    return (values.float() / scales).to(torch.float8_e4m3fn), scales


def load_quantized() -> ModuleType:
    """Return `tasks.decoder.quantized`, which wants Triton for the function that a test replaces."""
    try:
        from tasks.decoder import quantized
    except ImportError:
        kernels = ModuleType("tasks.decoder.kernels")
        kernels.quantize_rows = quantize_rows  # type: ignore[attr-defined]
        sys.modules["tasks.decoder.kernels"] = kernels
        from tasks.decoder import quantized

        del sys.modules["tasks.decoder.kernels"]
    return quantized


def build_operations() -> ModuleType:
    """Return the operations."""
    operations = ModuleType("plain_float8")
    vars(operations).update({name: value for name, value in vars(elementwise).items() if not name.startswith("__")})
    for name, (place, source) in _PLACES.items():
        setattr(operations, name, _quantizing(getattr(elementwise, name), place, source))
    return operations


def _quantizing(operation: Any, place: int, source: int) -> Any:
    def run(*arguments: Any) -> Any:
        quantized = arguments[place] if len(arguments) > place else None
        result = operation(*(None if number == place else given for number, given in enumerate(arguments)))
        if quantized is not None:
            for target, found in zip(quantized, quantize_rows(arguments[source]), strict=True):
                target.copy_(found)
        return result

    return run
