"""What a training asks of an engine: how a step's rows go through the model.

There are two: `fused` runs the fused decoder, `general` the model's own forward pass. Both give the same losses and
leave the same gradients with the adapter; they differ in speed alone. `choice` says which one trains.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tasks.decoder.passes import RecordingRule
from tasks.training.batches import Batch
from tasks.training.token_table import TokenTable


class Engine(Protocol):
    """What a training asks of an engine."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def recomputed_part(self) -> float:
        """Of the layers, those that run again in the backward pass."""
        ...

    @property
    def room_tokens(self) -> int:
        """Tokens whose forward and backward pass fits into the memory."""
        ...

    @property
    def recording(self) -> RecordingRule | None:
        """Which passes are recorded and replayed; None where none is."""
        ...

    @property
    def long_ways(self) -> tuple[int, int]:
        """What is done for long examples alone: tokens of a piece, and layers whose inputs lie in the host's memory."""
        ...

    @property
    def is_flat(self) -> bool:
        """Whether examples lie end to end, without padding."""
        ...

    def form_step(self, table: TokenTable, rows: Sequence[Sequence[int]], *, num_parts: int = 1) -> list[Batch]:
        """Make a step's batches of its rows, a multiple of `num_parts` of them where there are enough examples."""
        ...

    def form_evaluation(self, table: TokenTable) -> Iterator[Batch]:
        """Make batches of all examples, in any order, as large as they are fast."""
        ...

    def take_part(self, batch: Batch) -> Batch:
        """Return what this rank computes of a batch, where ranks share its tokens; else the batch."""
        ...

    def compute_log_probs(self, batch: Batch) -> Tensor:
        """Return log p(target) [N] of a batch's chosen positions (nats, fp32): the trained ones, and some of value 0.

        Their weights come with the backward pass; see `objective`.
        """
        ...

    def sum_losses(self, batch: Batch) -> Tensor:
        """Return the sum of -log p(target) over a batch's trained positions (nats, fp32 scalar)."""
        ...

    def replay_gradient(self, batch: Batch, scale: float) -> Tensor | None:
        """Add the gradient of scale times the sum from a recording, and return the sum; None where there is none."""
        ...

    def attach_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Take note of every step of the optimizer."""
        ...

    def bind_gradients(self) -> Tensor | None:
        """Give what is trained gradients that stay where they are, as one vector; None where that is not done."""
        ...

    def shrink(self) -> "Engine | None":
        """Return an engine that takes less memory for the same sum, or None."""
        ...

    def describe(self) -> str:
        """Say in a few words how it computes."""
        ...
