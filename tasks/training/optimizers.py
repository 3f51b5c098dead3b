"""What a step asks of an optimizer, and the optimizer that is whole on every rank; a divided one is in `zero`.

In a step: `add` for every micro batch, then `sum`, `clip` and `move` once.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tasks.training.adamw import set_learning_rate
from tasks.training.distributed import sum_flat, sum_gradients

_CLIP_EPS = 1e-6  # as in `torch.nn.utils.clip_grad_norm_`


class AdapterOptimizer(Protocol):
    """Gradients, clipping, AdamW and its state, for all ranks together."""

    def add(self, loss: Tensor, *, is_last: bool) -> None:
        """Add a micro batch's gradient to this rank's of the step; `is_last` for the step's last one."""
        ...

    def sum(self, *figures: Tensor) -> list[Tensor]:
        """Sum the gradient and scalar figures over the ranks; return the figures."""
        ...

    def clip(self) -> Tensor:
        """Return the gradient's global norm; the gradient that `move` applies is scaled down to the largest one."""
        ...

    def move(self, learning_rate: float, is_finite: Tensor) -> None:
        """Take the step, which changes nothing where the tensor says that it is not fine, and forget the gradient."""
        ...

    def forget(self) -> None:
        """Forget the gradient."""
        ...

    def unsharded(self) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        """Return what is trained and its optimizer as one process would hold them; every rank has to ask."""
        ...


@dataclass(frozen=True)
class WholeOptimizer:
    """Every rank holds all of it, and does the same."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    flat: Tensor | None = None
    """The gradients of all parameters end to end, where they stay; None: they are made anew in each step."""
    waits: bool = False
    """For whether a step may be done: the optimizer cannot be told on the device to leave it."""

    def add(self, loss: Tensor, *, is_last: bool) -> None:
        """Add to the parameters' own gradients."""
        loss.backward()

    def sum(self, *figures: Tensor) -> list[Tensor]:
        """Sum all in one collective."""
        if self.flat is not None:
            return sum_flat(self.flat, *figures)
        return sum_gradients(self.parameters.values(), *figures)

    def clip(self) -> Tensor:
        """Scale the gradient down at once."""
        if self.flat is not None:
            norm = torch.linalg.vector_norm(self.flat)
            self.flat.mul_((self.max_grad_norm / (norm + _CLIP_EPS)).clamp(max=1.0))
            return norm
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)

    def move(self, learning_rate: float, is_finite: Tensor) -> None:
        """Queue PyTorch's step on the device, without waiting for whether it may be done."""
        set_learning_rate(self.optimizer, learning_rate)
        if not self.waits:
            # AdamW in its fused form asks for this on the device, as a gradient scaler sets it.
            self.optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        if not self.waits or is_finite.item():
            self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Set what stays where it is to zero, and let go of what does not."""
        if self.flat is not None:
            self.flat.zero_()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def unsharded(self) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        """Return the things themselves."""
        return self.parameters, self.optimizer
