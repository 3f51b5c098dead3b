"""Reads single modules of a model of transformers and PEFT; those that do more than is known are refused."""

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from tasks.decoder.adapters import Part
from tasks.decoder.norms import Norm
from tasks.decoder.weights import TrainedWeights


class UnknownDecoderError(ValueError):
    """The model, or its adapter, has something that the fused decoder does not do; the message says what."""


def check_modules(module: nn.Module, wanted: Collection[str]) -> None:
    """Refuse a module that has other modules than its family's."""
    found = {name for name, _ in module.named_children()}
    if found != set(wanted):
        differs = ", ".join(sorted(found ^ set(wanted)))
        raise UnknownDecoderError(f"its {type(module).__name__} has other modules than is known: {differs}")


def read_part(parent: nn.Module, name: str) -> Part:
    """Return a linear layer with its adapter, if it has one.

    Raises:
        UnknownDecoderError: it is something else, or its adapter does more than s B A x.
    """
    module: Any = getattr(parent, name)
    if type(module) is nn.Linear:
        return Part(module, None, None, 0.0)
    if not isinstance(module, LoraLayer) or type(module.base_layer) is not nn.Linear:
        raise UnknownDecoderError(f"its {name} is a {type(module).__name__}")
    if list(module.lora_A) != ["default"] or module.merged or any(module.use_dora.values()):
        raise UnknownDecoderError(f"the adapter of its {name} is not one plain LoRA")
    if type(module.lora_dropout["default"]) not in (nn.Identity, nn.Dropout):
        raise UnknownDecoderError(f"the dropout of its {name} is a {type(module.lora_dropout['default']).__name__}")
    lora_a: Any = module.lora_A["default"].weight
    lora_b: Any = module.lora_B["default"].weight
    return Part(module.base_layer, lora_a, lora_b, float(module.scaling["default"]))


def read_norm(
    module: Any, weights: TrainedWeights | None = None, *, is_weight_less_one: bool = False, factor: float = 1.0
) -> Norm:
    """Return an RMS norm, its weight times a factor; where it is among the trained weights, it follows the module's."""
    weight = module.weight.detach()
    wide = weight if weight.dtype == torch.float64 else weight.float()
    eps = float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)
    shift = 1.0 if is_weight_less_one else 0.0
    if shift or factor != 1.0:
        wide = (shift + wide) * factor
    if weights is None or not module.weight.requires_grad:
        return Norm(wide, eps)
    weights.add(module.weight)
    if wide.data_ptr() != weight.data_ptr():
        weights.follow(module.weight, wide, shift=shift, factor=factor)
    return Norm(wide, eps, module.weight, factor, weights)
