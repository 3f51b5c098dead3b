"""The state of every slot on the device, and the step that appends a chosen token to its answer without the host.

Dimensions: `W` slots, `A` longest answer, `S` stop ids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Board:
    """What the device knows of each slot. The tensors stay where they are: a recorded step reads and writes them."""

    newest: Tensor
    """[W] token that goes in next."""
    positions: Tensor
    """[W] of that token in its row."""
    counts: Tensor
    """[W] tokens of the answer so far."""
    rooms: Tensor
    """[W] most tokens of the answer."""
    is_alive: Tensor
    """[W]"""
    answers: Tensor
    """[W, A + 1]; the last column takes what nobody wants."""
    stop_ids: Tensor
    """[S]"""

    def take(self, chosen: Tensor, is_asked: Tensor, num_slots: int) -> None:
        """Append the chosen tokens [slots] to the answers of those of the first slots that are asked and alive."""
        newest, counts, is_alive = (state[:num_slots] for state in (self.newest, self.counts, self.is_alive))
        is_kept = is_asked & is_alive & ~(chosen[:, None] == self.stop_ids).any(dim=1)
        columns = torch.where(is_kept, counts, self.answers.shape[1] - 1)
        self.answers[:num_slots].scatter_(1, columns[:, None], chosen[:, None])
        counts += is_kept
        newest.copy_(torch.where(is_kept, chosen, newest))
        goes_on = is_kept & (counts < self.rooms[:num_slots])
        is_alive.copy_(torch.where(is_asked, goes_on, is_alive))

    def move(self, slots: Tensor) -> None:
        """Let what is in `slots` be in the first slots instead, and the others be empty."""
        for state in (self.newest, self.positions, self.counts, self.rooms, self.is_alive, self.answers):
            state[: len(slots)] = state[slots]
        self.is_alive[len(slots) :] = False


def make_board(num_slots: int, longest_answer: int, stop_ids: frozenset[int], device: torch.device) -> Board:
    """Return a board without rows."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.long, device=device)

    return Board(
        newest=zeros(num_slots),
        positions=zeros(num_slots),
        counts=zeros(num_slots),
        rooms=zeros(num_slots),
        is_alive=torch.zeros(num_slots, dtype=torch.bool, device=device),
        answers=zeros(num_slots, longest_answer + 1),
        stop_ids=torch.tensor(sorted(stop_ids), dtype=torch.long, device=device),
    )
