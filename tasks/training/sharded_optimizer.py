"""AdamW of a model's own weights that FSDP2 has divided among the ranks: each has its part of weights and moments."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tasks.training.distributed import rank, sum_gradients, world_size
from tasks.training.lora import collect_trained
from tasks.training.preparation import Setup


@dataclass(frozen=True)
class ShardedOptimizer:
    """Each rank holds and moves its part."""

    parameters: dict[str, nn.Parameter]
    """By the names that they had before they were divided."""
    optimizer: torch.optim.Optimizer
    max_grad_norm: float

    def add(self, loss: Tensor, *, is_last: bool) -> None:
        """Sum a micro batch's gradient over the ranks (FSDP2 takes their mean); keep this rank's part of it."""
        (loss * world_size()).backward()

    def sum(self, *figures: Tensor) -> list[Tensor]:
        """Sum the figures; the gradient is summed already."""
        return sum_gradients((), *figures)

    def clip(self) -> Tensor:
        """Scale the gradient down at once."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def move(self, learning_rate: float, is_finite: Tensor) -> None:
        """Wait for whether the step may be done, and take it; not fine is the end of the training."""
        if is_finite.item():
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Let go of the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def unsharded(self) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        """Gather weight by weight into the memory of the first rank's host; other ranks get empty ones."""
        gathered = {name: nn.Parameter(_gather(held.data)) for name, held in self.parameters.items()}
        optimizer = torch.optim.AdamW(list(gathered.values()))
        for name, held in self.parameters.items():
            state = self.optimizer.state.get(held, {})
            if state:
                optimizer.state[gathered[name]] = {key: _gather(value) for key, value in state.items()}
        return gathered, optimizer


def hand_over(setup: Setup, held: dict[str, nn.Parameter]) -> Setup:
    """Return a training whose model was just divided with an optimizer of this rank's parts.

    Args:
        setup: whose parameters were divided in place; its optimizer may have been restored from a checkpoint.
        held: what it had before, by the same names.
    """
    whole = setup.optimizer.unsharded()[1]
    parameters = collect_trained(setup.model)
    assert parameters.keys() == held.keys(), sorted(parameters.keys() ^ held.keys())
    config = setup.config
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    for name, parameter in parameters.items():
        state = dict(_divide_state(whole.state.pop(held[name], {}), parameter))
        if state:
            optimizer.state[parameter] = state
    return replace(
        setup, parameters=parameters, optimizer=ShardedOptimizer(parameters, optimizer, config.max_grad_norm)
    )


def _divide_state(state: dict[str, Tensor], parameter: Any) -> Iterator[tuple[str, Tensor]]:
    """Give each moment as its parameter lies, and the count of steps as it is."""
    device = parameter.to_local().device
    for key, value in state.items():
        whole = value.to(device)
        yield key, distribute_tensor(whole, parameter.device_mesh, parameter.placements) if value.dim() else whole


def _gather(value: Any) -> Tensor:
    """Return the whole tensor on the first rank's host, and an empty one on the others; all of them have to ask."""
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.cpu() if rank() == 0 else torch.empty(0)
