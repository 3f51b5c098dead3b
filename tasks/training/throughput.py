"""How much of what the machine can do is useful work.

    share of peak = tokens a second * useful FLOP a token / (ranks * FLOP a second of a large matrix product)

Useful are the forward product and the gradient of the input in every linear layer of the frozen base and its head, two
operations a weight each; of the routed experts those that a token is sent to count. The adapter's own products and what
is computed twice to save memory are overhead. Where the model's own weights are trained, a trained one has two
operations more, for its gradient, and the layers before the first trained one have no gradient at all.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn

_SIZE = 8192  # 1.1 TFLOP a product: large enough for the ceiling of today's GPUs
_REPEATS = 20
_EXPERTS = ".experts"
# What configs call the number of routed experts of a token.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


def count_useful_flop(model: nn.Module) -> float:
    """Return the useful FLOP of training one token: 4 * (weights that it meets, beside adapters; the head among them).

    Args:
        model: with an adapter, or with weights of its own that are trained.
    """
    return count_frozen_flop(model) if isinstance(model, PeftModel) else _count_own(model)


def count_frozen_flop(model: nn.Module) -> float:
    """Return the useful FLOP of a token beside whose layers an adapter is trained, or would be."""
    return 4.0 * sum(weight.num_met for weight in _list_weights(model) if not weight.is_trained)


def _count_own(model: nn.Module) -> float:
    """Return the useful FLOP of a token where the model's own weights are trained."""
    total = 0.0
    for weight in _list_weights(model):
        total += (2.0 + 2.0 * weight.is_reached + 2.0 * weight.is_trained) * weight.num_met
    return total


class _Weight(NamedTuple):
    """A matrix, or the matrices of a layer's experts."""

    num_met: float
    """Values that a token meets: of routed experts those of the ones that it is sent to."""
    is_trained: bool
    is_reached: bool
    """It, or a weight before it, is trained: a gradient goes back to its input."""


def _list_weights(model: nn.Module) -> Iterator[_Weight]:
    """Give the weights of all linear layers and routed experts, each once."""
    chosen, seen, has_begun = _count_chosen(model), set(), False
    modules = dict(model.named_modules())
    for path, module in modules.items():
        own = list(module.parameters(recurse=False))
        has_begun = has_begun or any(parameter.requires_grad for parameter in own)
        before, _, _ = path.rpartition(_EXPERTS) if path.endswith(_EXPERTS) else path.rpartition(f"{_EXPERTS}.")
        if isinstance(module, nn.Linear):
            # By the layer's shape: weights in 8 or 4 bits lie elsewhere, or packed.
            share = chosen / len(list(modules[before + _EXPERTS].children())) if before else 1.0
            found = [(module.weight, share * module.in_features * module.out_features)]
        else:
            matrices = [parameter for parameter in own if before and parameter.dim() == 3]
            found = [(matrix, matrix.numel() * chosen / matrix.shape[0]) for matrix in matrices]
        for weight, num_met in found:
            if id(weight) not in seen:
                seen.add(id(weight))
                yield _Weight(num_met, weight.requires_grad, has_begun)


def _count_chosen(model: nn.Module) -> int:
    """Return how many routed experts a token is sent to; 1 where neither the config nor a router says."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    routers = (getattr(module, "top_k", None) for module in model.modules())
    for number in (*(getattr(text, name, None) for name in _CHOSEN), *routers):
        if isinstance(number, int) and number > 0:
            return number
    return 1


def measure_peak(device: torch.device, *, size: int = _SIZE, repeats: int = _REPEATS) -> float | None:
    """Return the FLOP a second of large bf16 matrix products, measured now; None where they do not fit."""
    try:
        left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(left)
        torch.mm(left, right, out=out)
        seconds = []
        for _ in range(3):
            _wait(device)
            started = time.perf_counter()
            for _ in range(repeats):
                torch.mm(left, right, out=out)
            _wait(device)
            seconds.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return None
    return 2.0 * size**3 * repeats / min(seconds)


def _wait(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
