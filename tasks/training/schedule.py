"""How many steps there are, and the learning rate of each: pure functions of the step, so resuming needs no state."""

import math
from collections.abc import Callable

from schemas.config import TrainingConfig

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),  # Loshchilov and Hutter, 2017, without restarts
    "linear": lambda done: 1.0 - done,
    "constant": lambda done: 1.0,
}
"""Of each scheduler: the part of the peak that is left after a part `done`, in [0, 1), of the steps after the warm-up.

A further one is an entry here and a choice of `training.scheduler`.
"""


def count_steps(num_rows: int, config: TrainingConfig) -> tuple[int, int]:
    """Return (steps of an epoch, steps of the whole training).

    The last step of an epoch may be short: no row is dropped, and none is seen twice.

    Args:
        num_rows: examples, or packs when packing.
        config: micro batch, accumulation, epochs and max_steps.
    """
    steps_per_epoch = math.ceil(num_rows / config.rows_per_step)
    num_steps = max(1, math.ceil(steps_per_epoch * config.num_epochs))
    return steps_per_epoch, min(num_steps, config.max_steps or num_steps)


def compute_learning_rate(step: int, num_steps: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step (from 0).

    Warm-up over w = ceil(warmup_fraction * num_steps) steps: peak * (step + 1) / (w + 1), never zero, and the peak
    is reached at step w. Then peak * SCHEDULES[scheduler](t) with t = (step - w) / (num_steps - w).

    Raises:
        ValueError: there is no such scheduler.
    """
    fall = SCHEDULES.get(config.scheduler)
    if fall is None:
        raise ValueError(f"training.scheduler: no {config.scheduler!r}; there are {', '.join(SCHEDULES)}")
    num_warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / (num_warmup + 1)
    return config.learning_rate * fall((step - num_warmup) / (num_steps - num_warmup))
