"""The base divided among the ranks (FSDP2) for the general engine; the fused one does it itself, for ZeRO see `zero`.

Each rank keeps its part of every frozen weight and gathers a layer's others just before it is used. The adapter is
small and stays whole on every rank, so that gradients, clipping, optimizer and checkpoints are the same as without.
Where the base's own weights are trained they are divided too, with gradients and optimizer (`sharded_optimizer`).
"""

from typing import Any

import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from schemas.config import TrainingConfig
from tasks.training.distributed import world_size
from tasks.training.methods import find_base


def is_sharded(config: TrainingConfig) -> bool:
    """Say whether a forward or a backward pass is a collective, which every rank has to do as often."""
    return config.strategy != "ddp" and world_size() > 1


def has_collective_passes(config: TrainingConfig) -> bool:
    """Say whether ranks wait for each other within a forward pass, so that none may do one by itself."""
    return is_sharded(config) or (config.context_parallel > 1 and world_size() > 1)


def is_zero(config: TrainingConfig) -> bool:
    """Say whether DeepSpeed divides the training among the ranks."""
    return config.strategy in ("zero2", "zero3") and world_size() > 1


def shard_base(model: PeftModel, device: torch.device) -> None:
    """Divide the frozen weights among the ranks, in place: one group a decoder layer, and one for the rest.

    Args:
        model: its base wherever it is: each rank's part goes to the device, on which the whole never has to fit; what
            is trained on the device.
        device: of this rank.
    """
    _shard(model, device, ignored={parameter for parameter in model.parameters() if parameter.requires_grad})


def shard_weights(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Divide all weights among the ranks, in place, those that are trained too.

    Args:
        model: wherever it is, as in `shard_base`.
        device: of this rank.
        dtype: that weights are gathered in, while what is kept of them, and their gradients, stays as it is.
    """
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    _shard(model, device, ignored=set(), policy=policy)


def _shard(
    model: Any, device: torch.device, *, ignored: set[torch.nn.Parameter], policy: MixedPrecisionPolicy | None = None
) -> None:
    mesh = init_device_mesh(device.type, (world_size(),))
    options: dict[str, Any] = {"mp_policy": policy} if policy else {}
    base = find_base(model)
    names = set(base._no_split_modules or ())
    for module in base.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, ignored_params=ignored, **options)
    fully_shard(model, mesh=mesh, ignored_params=ignored, **options)
