"""ZeRO (DeepSpeed through accelerate): gradients and AdamW's moments divided among the ranks, in stage 3 all weights.

DeepSpeed is an extra and imported here only. It sums gradients during each backward pass, clips and steps. What makes
it optimize the same sum as one process:

- it divides a sum of gradients by the number of ranks, so the loss is multiplied by that;
- it is told which micro batch is a step's last, however many they are;
- its 16-bit modes, which would round the adapter, are off: it computes under autocast, as the general engine does.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.training.distributed import sum_gradients, world_size
from tasks.training.engines.general import GeneralEngine
from tasks.training.methods import find_base
from tasks.training.preparation import Setup

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LARGEST_BUCKET = 500_000_000  # DeepSpeed's default, which it allocates in full


@dataclass(frozen=True)
class ZeroOptimizer:
    """What is trained is held by DeepSpeed: each rank has its part of gradients and moments."""

    engine: Any
    """DeepSpeed's."""
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    """AdamW of this rank's part, which DeepSpeed drives."""

    def add(self, loss: Tensor, *, is_last: bool) -> None:
        """Sum a micro batch's gradient over the ranks; keep this rank's part of it."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * world_size())

    def sum(self, *figures: Tensor) -> list[Tensor]:
        """Sum the figures; the gradient is summed already."""
        return sum_gradients((), *figures)

    def clip(self) -> Tensor:
        """Measure the gradient, which DeepSpeed clips in its step."""
        parts = [part for parts in self.engine.optimizer.averaged_gradients.values() for part in parts]
        square = torch.stack([part.float().norm() ** 2 for part in parts]).sum()
        dist.all_reduce(square)
        return square.sqrt()

    def move(self, learning_rate: float, is_finite: Tensor) -> None:
        """Wait for whether the step may be done, and take DeepSpeed's; not fine is the end of the training."""
        if is_finite.item():
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.engine.step()

    def forget(self) -> None:
        """Let go of what a pass that failed has left."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def unsharded(self) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        """Gather a copy on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        gathered = {name: nn.Parameter(safe_get_full_fp32_param(held)) for name, held in self.parameters.items()}
        optimizer = torch.optim.AdamW(list(gathered.values()))
        for state in list(self.optimizer.state.values())[:1]:  # none before the first step
            for name, held in self.parameters.items():
                moments = {key: safe_get_full_optimizer_state(held, key) for key in _MOMENTS}
                optimizer.state[gathered[name]] = {"step": state["step"], **moments}
        return gathered, optimizer


def divide(setup: Setup) -> Setup:
    """Hand a training that is whole on every rank, perhaps restored from a checkpoint, over to DeepSpeed."""
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin

    assert isinstance(setup.engine, GeneralEngine)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # PyTorch 2.13 says so at each of DeepSpeed's collectives.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # None of its own kernels: they are compiled at first use, and PyTorch does all that is needed here.
    deepspeed.ops.__compatible_ops__ = {}
    settings = _describe(setup)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False))
    parameters, optimizer = setup.optimizer.unsharded()
    states = {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items()}
    optimizer.state.clear()
    if setup.config.strategy == "zero3":
        # Weight by weight from wherever they are: a device never has to hold the whole model.
        deepspeed.zero.Init(module=setup.model, config_dict_or_path=settings)
    engine, _ = accelerator.prepare(setup.model, optimizer)
    if any(states.values()):
        _divide_moments(engine.optimizer, optimizer, parameters, states)
    return replace(
        setup, engine=replace(setup.engine, model=engine), optimizer=ZeroOptimizer(engine, parameters, optimizer)
    )


def _describe(setup: Setup) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    num_trained = sum(parameter.numel() for parameter in setup.parameters.values())
    base = find_base(setup.model)
    return {
        "train_micro_batch_size_per_gpu": 1,  # of no meaning here
        "train_batch_size": world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": setup.config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": setup.dtype != torch.float32,
            "dtype": str(setup.dtype).removeprefix("torch."),
            "lower_precision_safe_modules": [],  # of which gradients would be summed in 16 bits
        },
        "zero_optimization": {
            "stage": int(setup.config.strategy.removeprefix("zero")),
            "reduce_bucket_size": min(num_trained, _LARGEST_BUCKET),
            # Norms and biases stay whole: gathering them takes longer than they are large (accelerate's rule).
            "stage3_param_persistence_threshold": 10 * base.config.get_text_config().hidden_size,
        },
    }


def _divide_moments(
    divided: Any,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    states: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give each rank its part of the moments that one process would hold."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    step = next(iter(states.values()))["step"]
    is_stage_3 = hasattr(divided, "fp32_partitioned_groups_flat")
    parts = divided.fp32_partitioned_groups_flat if is_stage_3 else divided.single_partition_of_fp32_groups
    for part in parts:
        optimizer.state[part] = {"step": step.to(part.device), **{key: torch.zeros_like(part) for key in _MOMENTS}}
    if not is_stage_3:
        divided._lazy_init_hp_params_optimizer_state()
    for name, parameter in parameters.items():
        for key in _MOMENTS:
            moment = states[name][key]
            if is_stage_3:
                safe_set_local_optimizer_state(parameter, _cut(moment), key)
            else:
                safe_set_full_optimizer_state(parameter, moment, key)


def _cut(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor in stage 3's way: as many elements on each, filled up with zeros."""
    size = -(-tensor.numel() // world_size())
    padded = nn.functional.pad(tensor.flatten(), (0, size * world_size() - tensor.numel()))
    return padded[dist.get_rank() * size :][:size]
