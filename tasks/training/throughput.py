"""How much of what the machine can do is useful work.

    share of peak = tokens a second * useful FLOP a token / (ranks * FLOP a second of a large matrix product)

Useful are the forward product and the gradient of the input in every linear layer of the frozen base and its head, two
operations a weight each; the adapter's own products and what is computed twice to save memory are overhead. Where the
model's own weights are trained, a trained one has two operations more, for its gradient, and the layers before the
first trained one have no gradient at all.
"""

import time

import torch
from peft import PeftModel
from torch import nn

_SIZE = 8192  # 1.1 TFLOP a product: large enough for the ceiling of today's GPUs
_REPEATS = 20


def count_useful_flop(model: nn.Module) -> float:
    """Return the useful FLOP of training one token: 4 * (weights of the frozen linear layers, the head among them).

    Args:
        model: with an adapter, or with weights of its own that are trained.
    """
    return count_frozen_flop(model) if isinstance(model, PeftModel) else _count_own(model)


def count_frozen_flop(model: nn.Module) -> float:
    """Return the useful FLOP of a token beside whose layers an adapter is trained, or would be."""
    # By the layers' shapes: weights in 8 or 4 bits lie elsewhere, or packed.
    weights = {
        id(module.weight): module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    }
    return 4.0 * sum(weights.values())


def _count_own(model: nn.Module) -> float:
    """Return the useful FLOP of a token where the model's own weights are trained."""
    total, has_begun, seen = 0.0, False, set()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        has_begun = has_begun or any(parameter.requires_grad for parameter in own)
        if isinstance(module, nn.Linear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            total += (2.0 + 2.0 * has_begun + 2.0 * module.weight.requires_grad) * module.weight.numel()
    return total


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
