"""How much of what the machine can do is useful work.

    share of peak = tokens a second * useful FLOP a token / (ranks * FLOP a second of a large matrix product)

Useful are the forward product and the gradient of the input in every linear layer of the frozen base and its head, two
operations a weight each; the adapter's own products and what is computed twice to save memory are overhead.
"""

import time

import torch
from torch import nn

_SIZE = 8192  # 1.1 TFLOP a product: large enough for the ceiling of today's GPUs
_REPEATS = 20


def count_useful_flop(model: nn.Module) -> float:
    """Return the useful FLOP of training one token: 4 * (weights of the frozen linear layers, the head among them)."""
    # By the layers' shapes: weights in 8 or 4 bits lie elsewhere, or packed.
    weights = {
        id(module.weight): module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    }
    return 4.0 * sum(weights.values())


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
