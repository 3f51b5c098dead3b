"""Greedy answers of many rows at once, each in a slot that the next row takes when its own has ended.

Dimensions: see `board` and `keyvalues`.

On a GPU a step over all slots is recorded once and replayed (a CUDA graph): a model of many small layers would wait for
the host otherwise. Whether a row has ended is decided on the device, and the host looks only every few steps.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from tasks.evaluation.board import make_board
from tasks.evaluation.flat import (
    check_model,
    compare,
    compute_logits,
    flat_attention,
    lay_flat,
    make_trial_rows,
    run_flat,
)
from tasks.evaluation.keyvalues import KeyValues, NewestTokens, NewRows
from tasks.evaluation.recording import StepRecorder

STEPS_PER_LOOK = 8
PROMPT_TOKENS = 8192
"""Most tokens of the prompts that enter in one forward pass; a longer prompt enters alone."""
MAX_SLOTS = 256
"""Rows decoded at once where the config leaves it open: more are hardly faster on any GPU."""
MIN_WIDTH = 16
"""Fewer slots than this are not worth a graph of their own."""


@dataclass(frozen=True)
class Prompt:
    """A row that waits for a slot."""

    row: int
    tokens: Sequence[int]
    room: int
    """Most tokens of its answer, at least 1."""


class SlotDecoder:
    """A model with its slots; `decode` runs prompts through them."""

    def __init__(
        self, model: PreTrainedModel, *, num_slots: int, slot_length: int, longest_answer: int, stop_ids: frozenset[int]
    ) -> None:
        self.model = model
        # A round number: the kernels like their masks aligned.
        self.memory = KeyValues(num_slots, -(-slot_length // 32) * 32)
        self.board = make_board(num_slots, longest_answer, stop_ids, model.device)
        self.occupants: list[Prompt | None] = [None] * num_slots
        self.reached: list[int] = [0] * num_slots
        """Tokens that a slot holds at most by now."""
        self.recorder = StepRecorder() if model.device.type == "cuda" else None

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Prompt], answers: dict[int, list[int]], on_progress: Any) -> None:
        """Put the answers, by row, into `answers` as they end; prompts enter in the given order."""
        waiting = deque(prompts)
        width = len(self.occupants)
        with flat_attention(self.model):
            while waiting or any(self.occupants):
                num_free = self.occupants[:width].count(None)
                # A forward pass of the prompts costs as much as several steps: not for a single free slot.
                if waiting and (4 * num_free >= width or num_free == width):
                    self._enter(waiting)
                elif not waiting and width > MIN_WIDTH and 2 * (width - num_free) <= width:
                    width = self._narrow(width)
                self._advance(width)
                finished = self._collect(width, answers)
                if finished:
                    on_progress(finished)

    def _enter(self, waiting: deque[Prompt]) -> None:
        """Fill the free slots."""
        free = deque(slot for slot, prompt in enumerate(self.occupants) if prompt is None)
        while free and waiting:
            entering: list[tuple[int, Prompt]] = []
            num_tokens = 0
            while free and waiting and (not entering or num_tokens + len(waiting[0].tokens) <= PROMPT_TOKENS):
                entering.append((free.popleft(), waiting.popleft()))
                num_tokens += len(entering[-1][1].tokens)
            self._read_prompts(entering)

    def _read_prompts(self, entering: Sequence[tuple[int, Prompt]]) -> None:
        """Run prompts through the model, end to end, and take the first token of each answer."""
        board, device = self.board, self.model.device
        flat = lay_flat([prompt.tokens for _, prompt in entering], device)
        lengths = torch.tensor(flat.segments.lengths, device=device)
        slots = torch.tensor([slot for slot, _ in entering], device=device)
        places = (slots * self.memory.slot_length).repeat_interleave(lengths) + flat.positions
        layout = NewRows(flat.segments, self.memory, places)
        ends = flat.segments.borders[1:].long() - 1
        logits = run_flat(self.model, flat.input_ids, flat.positions, layout, ends)
        board.positions[slots] = lengths
        board.counts[slots] = 0
        board.rooms[slots] = torch.tensor([prompt.room for _, prompt in entering], device=device)
        board.is_alive[slots] = True
        is_new = torch.zeros_like(board.is_alive)
        is_new[slots] = True
        chosen = torch.zeros_like(board.newest)
        chosen[slots] = logits.argmax(dim=-1)
        board.take(chosen, is_new, len(self.occupants))
        for slot, prompt in entering:
            self.occupants[slot], self.reached[slot] = prompt, len(prompt.tokens)

    def _advance(self, width: int) -> None:
        """Do a few steps with the first slots."""
        held = [reached for reached, prompt in zip(self.reached, self.occupants, strict=True) if prompt is not None]
        num_seen = min(round_up(max(held) + STEPS_PER_LOOK), self.memory.slot_length)
        for _ in range(STEPS_PER_LOOK):
            if self.recorder is None:
                self._step(width, num_seen)
            else:
                self.recorder.run(self._step, width, num_seen)
        self.reached = [reached + STEPS_PER_LOOK for reached in self.reached]

    def _step(self, width: int, num_seen: int) -> None:
        """Give each of the first slots its next token; slots without a living row do work that nobody sees."""
        board = self.board
        positions, is_alive = board.positions[:width], board.is_alive[:width]
        # Without a living row, at 0: there is always something to attend to, so that no NaN is remembered.
        places = torch.where(is_alive, positions, 0)
        everything = torch.arange(width, device=positions.device)
        layout = NewestTokens(self.memory, places, num_seen)
        logits = run_flat(self.model, board.newest[:width], places, layout, everything)
        # The token that went in is remembered now; a row that has ended stays where it is.
        positions += is_alive
        board.take(logits.argmax(dim=-1), is_alive, width)

    def _collect(self, width: int, answers: dict[int, list[int]]) -> int:
        """Take the rows that have ended out of their slots; return how many."""
        is_alive = self.board.is_alive[:width].tolist()
        ended = [
            (slot, prompt) for slot, prompt in enumerate(self.occupants) if prompt is not None and not is_alive[slot]
        ]
        if ended:
            slots = torch.tensor([slot for slot, _ in ended], device=self.model.device)
            counts, tokens = self.board.counts[slots].tolist(), self.board.answers[slots].tolist()
            for (slot, prompt), count, row in zip(ended, counts, tokens, strict=True):
                answers[prompt.row] = row[:count]
                self.occupants[slot] = None
        return len(ended)

    def _narrow(self, width: int) -> int:
        """Bring the living rows into the first half of the slots, or fewer; return how many slots go on."""
        living = [slot for slot, prompt in enumerate(self.occupants) if prompt is not None]
        if not living:
            return width
        while width > MIN_WIDTH and 2 * len(living) <= width:
            width = -(-width // 2)
        slots = torch.tensor(living, device=self.model.device)
        self.memory.move(slots)
        self.board.move(slots)
        empty = [None] * (len(self.occupants) - len(living))
        self.occupants = [*(self.occupants[slot] for slot in living), *empty]
        self.reached = [*(self.reached[slot] for slot in living), *(0 for _ in empty)]
        return width


def round_up(num_tokens: int) -> int:
    """Return the next of 64, 96, 128, 192, 256, 384, …: few lengths to record steps for, none a half too long."""
    length = 64
    while length < num_tokens:
        length *= 2
    return length * 3 // 4 if length > 64 and length * 3 // 4 >= num_tokens else length


@torch.inference_mode()
def check_slots(model: PreTrainedModel) -> int:
    """Try out a step on two short rows against the model's own forward pass; return the bytes that a token takes.

    Raises:
        UnsupportedModelError: the model cannot be run in slots.
    """
    check_model(model)
    rows = make_trial_rows(model)
    expected = torch.stack([compute_logits(model, row)[-1] for row in rows])
    device, memory = model.device, KeyValues(len(rows), 16)
    flat = lay_flat([row[:-1] for row in rows], device)
    lengths = torch.tensor(flat.segments.lengths, device=device)
    slots = torch.arange(len(rows), device=device)
    layout = NewRows(flat.segments, memory, (slots * 16).repeat_interleave(lengths) + flat.positions)
    with flat_attention(model):
        run_flat(model, flat.input_ids, flat.positions, layout, slots)
        newest = torch.tensor([row[-1] for row in rows], device=device)
        found = run_flat(model, newest, lengths, NewestTokens(memory, lengths, 16), slots)
    compare(expected, found)
    return memory.count_bytes()


def choose_num_slots(prompts: Sequence[Prompt], bytes_per_token: int, device: torch.device) -> int:
    """Return how many slots fit into half the free memory of a GPU: at least 1, at most MAX_SLOTS."""
    slot_bytes = bytes_per_token * max(len(prompt.tokens) + prompt.room for prompt in prompts)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(MAX_SLOTS, free // 2 // slot_bytes))
