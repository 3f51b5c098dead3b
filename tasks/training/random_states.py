"""The random states of torch, numpy and Python: read, put back, and drawn apart for several ranks."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.training.distributed import rank


def read_random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return torch's states as tensors, and those of Python and numpy as JSON values, of this rank."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    legacy: Any = np.random.get_state(legacy=False)
    legacy["state"]["key"] = legacy["state"]["key"].tolist()
    return states, {"python": random.getstate(), "numpy": legacy}


def write_random_states(states: Mapping[str, Tensor], generators: Mapping[str, Any]) -> None:
    """Put random states back; that of a GPU is left out where there is none."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    version, words, gauss = generators["python"]
    random.setstate((version, tuple(words), gauss))
    legacy = dict(generators["numpy"])
    legacy["state"] = {**legacy["state"], "key": np.array(legacy["state"]["key"], np.uint32)}
    np.random.set_state(legacy)


def seed_per_rank(seed: int, step: int) -> None:
    """Give each rank but the first random states of its own, for dropout that is not the same on all."""
    if rank() == 0:
        return
    number = int(np.random.SeedSequence([seed, step, rank()]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
