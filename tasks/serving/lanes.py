"""Rows that a served model goes on with at the same time: each enters and leaves when it likes.

Dimensions: `N` entering rows, `R` rows that go on, `V` vocabulary.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.evaluation.flat import flat_attention, lay_flat, run_flat
from tasks.evaluation.keyvalues import KeyValues, NewestTokens, NewRows
from tasks.evaluation.padded import forward, pad_left
from tasks.evaluation.slots import round_up


class Lanes(Protocol):
    """A model with what it remembers of its rows. A row is known by its handle, an integer."""

    @property
    def num_free(self) -> int:
        """Rows that may enter."""
        ...

    def enter(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Read prompts; return a handle of each, and the logits [N, V] after its last token."""
        ...

    def advance(self, newest: dict[int, int]) -> tuple[list[int], Tensor]:
        """Give each row its newest token; return handles, and the logits [R, V] after them in the same order."""
        ...

    def leave(self, handle: int) -> None:
        """Forget a row."""
        ...

    def clear(self) -> None:
        """Forget all rows, also after a step that failed half way."""
        ...


class SlotLanes:
    """Rows in slots of a memory, as the evaluation decodes on a GPU: whoever enters joins the next step."""

    def __init__(self, model: PreTrainedModel, *, num_slots: int, slot_length: int) -> None:
        self.model = model
        self.num_slots, self.slot_length = num_slots, -(-slot_length // 32) * 32
        self._stack = ExitStack()
        self._stack.enter_context(flat_attention(model))
        self.clear()

    @property
    def num_free(self) -> int:
        """Slots that nobody is in."""
        return self.num_slots - len(self._lengths)

    def clear(self) -> None:
        """Forget all rows."""
        self._memory = KeyValues(self.num_slots, self.slot_length)
        self._lengths: dict[int, int] = {}

    @torch.inference_mode()
    def enter(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Read prompts end to end into free slots."""
        device = self.model.device
        handles = [slot for slot in range(self.num_slots) if slot not in self._lengths][: len(prompts)]
        flat = lay_flat(prompts, device)
        lengths = torch.tensor(flat.segments.lengths, device=device)
        slots = torch.tensor(handles, device=device)
        places = (slots * self.slot_length).repeat_interleave(lengths) + flat.positions
        layout = NewRows(flat.segments, self._memory, places)
        ends = flat.segments.borders[1:].long() - 1
        logits = run_flat(self.model, flat.input_ids, flat.positions, layout, ends)
        self._lengths |= {handle: len(prompt) for handle, prompt in zip(handles, prompts, strict=True)}
        return handles, logits

    @torch.inference_mode()
    def advance(self, newest: dict[int, int]) -> tuple[list[int], Tensor]:
        """Step over the slots up to the last one in use; what is in free ones is never looked at."""
        device = self.model.device
        width = max(self._lengths) + 1
        handles = sorted(self._lengths)
        # A free slot writes to its own position 0, which the next row that enters writes anew.
        tokens = torch.tensor([newest.get(slot, 0) for slot in range(width)], device=device)
        places = torch.tensor([self._lengths.get(slot, 0) for slot in range(width)], device=device)
        num_seen = min(round_up(max(self._lengths.values()) + 1), self.slot_length)
        keep = torch.tensor(handles, device=device)
        layout = NewestTokens(self._memory, places, num_seen)
        logits = run_flat(self.model, tokens, places, layout, keep)
        for handle in handles:
            self._lengths[handle] += 1
        return handles, logits

    def leave(self, handle: int) -> None:
        """Free a slot."""
        del self._lengths[handle]


@dataclass
class _Cohort:
    """Rows that entered together, padded on the left."""

    handles: list[int]
    cache: Any
    mask: Tensor
    positions: Tensor


class CohortLanes:
    """Rows in padded batches, as the evaluation decodes any model: those that entered together step together."""

    def __init__(self, model: PreTrainedModel, *, num_rows: int) -> None:
        self.model, self.num_rows = model, num_rows
        self._numbers = count()
        self.clear()

    @property
    def num_free(self) -> int:
        """Rows that may enter."""
        return self.num_rows - sum(len(cohort.handles) for cohort in self._cohorts)

    def clear(self) -> None:
        """Forget all rows."""
        self._cohorts: list[_Cohort] = []

    @torch.inference_mode()
    def enter(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Read prompts as a padded batch."""
        input_ids, mask, positions = pad_left(prompts, self.model.device)
        logits, cache = forward(self.model, input_ids, mask, positions, cache=None, use_cache=True, keep=1)
        handles = [next(self._numbers) for _ in prompts]
        self._cohorts.append(_Cohort(list(handles), cache, mask, positions[:, -1:]))
        return handles, logits[:, -1]

    @torch.inference_mode()
    def advance(self, newest: dict[int, int]) -> tuple[list[int], Tensor]:
        """Step each cohort."""
        handles: list[int] = []
        parts: list[Tensor] = []
        for cohort in self._cohorts:
            tokens = [[newest[handle]] for handle in cohort.handles]
            input_ids = torch.tensor(tokens, device=self.model.device)
            cohort.mask = torch.cat([cohort.mask, cohort.mask.new_ones(len(tokens), 1)], dim=1)
            cohort.positions = cohort.positions + 1
            logits, cohort.cache = forward(
                self.model, input_ids, cohort.mask, cohort.positions, cache=cohort.cache, use_cache=True, keep=1
            )
            handles += cohort.handles
            parts.append(logits[:, -1])
        return handles, torch.cat(parts)

    @torch.inference_mode()
    def leave(self, handle: int) -> None:
        """Take a row out of its cohort, and an empty cohort away."""
        cohort = next(cohort for cohort in self._cohorts if handle in cohort.handles)
        kept = [at for at, other in enumerate(cohort.handles) if other != handle]
        if not kept:
            self._cohorts.remove(cohort)
            return
        index = torch.tensor(kept, device=self.model.device)
        cohort.cache.reorder_cache(index)
        cohort.mask, cohort.positions = cohort.mask[index], cohort.positions[index]
        cohort.handles = [cohort.handles[at] for at in kept]
