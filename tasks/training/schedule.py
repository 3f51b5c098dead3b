"""How many steps there are, and the learning rate of each: pure functions of the step, so resuming needs no state."""

import math

from schemas.config import TrainingConfig


def count_steps(num_rows: int, config: TrainingConfig) -> tuple[int, int]:
    """Return (steps of an epoch, steps of the whole training).

    The last step of an epoch may be short: no row is dropped, and none is seen twice.

    Args:
        num_rows: examples, or packs when packing.
        config: micro batch, accumulation, epochs and max_steps.
    """
    steps_per_epoch = math.ceil(num_rows / (config.micro_batch * config.gradient_accumulation_steps))
    num_steps = max(1, math.ceil(steps_per_epoch * config.num_epochs))
    return steps_per_epoch, min(num_steps, config.max_steps or num_steps)


def compute_learning_rate(step: int, num_steps: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step (from 0).

    Warm-up over w = ceil(warmup_fraction * num_steps) steps: peak * (step + 1) / (w + 1), never zero, and the peak
    is reached at step w. Then, with t = (step - w) / (num_steps - w) in [0, 1): cosine peak * (1 + cos(pi t)) / 2
    (Loshchilov and Hutter, 2017, without restarts), linear peak * (1 - t), or constant.
    """
    num_warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / (num_warmup + 1)
    if config.scheduler == "constant":
        return config.learning_rate
    done = (step - num_warmup) / (num_steps - num_warmup)
    factor = 1.0 - done if config.scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * factor
