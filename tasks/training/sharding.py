"""The frozen base divided among the ranks (FSDP2), for models that are too large for one GPU.

Each rank keeps its part of every frozen weight and gathers a layer's others just before it is used. The adapter is
small and stays whole on every rank, so that gradients, clipping, optimizer and checkpoints are the same as without.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from schemas.config import TrainingConfig
from tasks.training.distributed import world_size


def is_sharded(config: TrainingConfig) -> bool:
    """Say whether a forward pass is a collective, which every rank has to do as often."""
    return config.strategy == "fsdp" and world_size() > 1


def shard_base(model: PeftModel, device: torch.device) -> None:
    """Divide the frozen weights among the ranks, in place: one group a decoder layer, and one for the rest.

    Args:
        model: wherever it is; each rank's part goes to the device, so that a model on the CPU never has to fit there.
        device: of this rank.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    base: Any = model.get_base_model()
    names = set(base._no_split_modules or ())
    for module in base.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, ignored_params=trained)
    fully_shard(model, mesh=mesh, ignored_params=trained)
