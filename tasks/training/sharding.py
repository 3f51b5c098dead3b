"""The frozen base divided among the ranks (FSDP2), for models that are too large for one GPU.

Each rank keeps its part of every frozen weight and gathers a layer's others just before it is used. The adapter is
small and stays whole on every rank, so that gradients, clipping, optimizer and checkpoints are the same as without.
"""

from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tasks.training.distributed import world_size
from tasks.training.preparation import Setup


def is_sharded(setup: Setup) -> bool:
    """Say whether a forward pass is a collective, which every rank has to do as often."""
    return setup.config.strategy == "fsdp" and world_size() > 1


def shard_base(setup: Setup) -> None:
    """Divide the frozen weights among the ranks, in place: one group a decoder layer, and one for the rest."""
    mesh = init_device_mesh(setup.device.type, (world_size(),))
    trained = set(setup.parameters.values())
    base: Any = setup.model.get_base_model()
    names = set(base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(setup.model, mesh=mesh, ignored_params=trained)
