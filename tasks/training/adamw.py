"""AdamW (Loshchilov and Hutter, 2019): PyTorch's, or torchao's with moments in 8 bits (Dettmers et al., 2022).

torchao keeps a moment of 4,096 values or more as codes of 8 bits with a scale for each block; smaller ones stay fp32.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from schemas.config import TrainingConfig
from tasks.training.records import TrainingError

EIGHT_BITS = "adamw_8bit"
_SIGNED = "exp_avg"  # the other moment is a square


def check_optimizer(config: TrainingConfig) -> None:
    """Raise TrainingError where torchao is wanted and not installed."""
    if config.optimizer == EIGHT_BITS and find_spec("torchao") is None:
        raise TrainingError(
            f"training.optimizer is {EIGHT_BITS}, which needs torchao: pip install 'sft-pipeline[torchao]' on the "
            "machine that trains, or set training.optimizer to adamw"
        )


def build_adamw(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a config.

    Raises:
        TrainingError: it is not installed.
    """
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer != EIGHT_BITS:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    check_optimizer(config)
    from torchao.optim import AdamW8bit  # type: ignore[import-not-found,unused-ignore]

    made: torch.optim.Optimizer = AdamW8bit(parameters, lr=rate, weight_decay=decay)
    return made


def count_moment_bytes(config: TrainingConfig) -> int:
    """Return the bytes of both moments of a value."""
    return 2 if config.optimizer == EIGHT_BITS else 8


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the next step; torchao keeps it as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def take_apart(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Give the plain tensors of one entry of an optimizer's state: itself, or what a quantized one is made of."""
    if not hasattr(value, "__tensor_flatten__"):
        yield key, value
        return
    names, _ = value.__tensor_flatten__()
    for name in names:
        yield f"{key}|{name}", getattr(value, name)


def put_together(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return an optimizer's state of one parameter from the tensors of `take_apart`."""
    state: dict[str, Any] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("|")
        if name:
            parts.setdefault(key, {})[name] = tensor
        else:
            state[key] = tensor
    if parts:
        from torchao.optim.subclass_8bit import OptimState8bit  # type: ignore[import-not-found,unused-ignore]

        for key, found in parts.items():
            state[key] = OptimState8bit(
                found["codes"], found["scale"], found["qmap"], signed=key == _SIGNED, dtype=torch.float32
            )
    return state
