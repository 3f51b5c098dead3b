"""How a step's rows go through the model: through the fused decoder, or through the model's own forward pass.

Both give the sum of the token losses and leave its gradient with the adapter; which one is a matter of speed alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from tasks.decoder.attention import name_attention
from tasks.decoder.decoder import Decoder, sum_losses
from tasks.decoder.passes import FlatBatch, PassRecorder
from tasks.training.batches import Batch, form_flat_step, form_padded_step
from tasks.training.loss import sum_token_losses
from tasks.training.token_table import TokenTable

# Examples of an evaluation that are divided among forward passes together.
EVALUATION_ROWS = 4096


class Engine(Protocol):
    """What a training asks of an engine."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def form_step(self, table: TokenTable, rows: Sequence[Sequence[int]], *, num_parts: int = 1) -> list[Batch]:
        """Make a step's batches of its rows, a multiple of `num_parts` of them where there are enough examples."""
        ...

    def form_evaluation(self, table: TokenTable) -> Iterator[Batch]:
        """Make batches of all examples, in any order, as large as they are fast."""
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


@dataclass(frozen=True)
class GeneralEngine:
    """Any causal language model of transformers: padded micro batches."""

    model: PeftModel
    device: torch.device
    dtype: torch.dtype
    micro_batch: int
    trained_only: bool
    """Whether the head can be computed at the trained positions alone."""
    keeps_packs: bool = True
    """Whether examples in one row stay apart; where not, a pack's examples get rows of their own."""
    may_recompute: bool = False
    """Whether the model can compute its layers again in the backward pass, and does not yet."""

    def form_step(self, table: TokenTable, rows: Sequence[Sequence[int]], *, num_parts: int = 1) -> list[Batch]:
        """Pad rows side by side."""
        if not self.keeps_packs:
            rows = [[index] for row in rows for index in row]
        micro_batch = max(1, min(self.micro_batch, len(rows) // num_parts))
        return form_padded_step(table, rows, micro_batch)

    def form_evaluation(self, table: TokenTable) -> Iterator[Batch]:
        """Pad examples of like length side by side."""
        for rows in _cut_by_length(table, self.micro_batch):
            yield from self.form_step(table, rows)

    def sum_losses(self, batch: Batch) -> Tensor:
        """Go through the model's own forward pass, in 16-bit products where the base is 16-bit."""
        with self._autocast():
            return sum_token_losses(self.model, batch.move(self.device), trained_only=self.trained_only)

    def replay_gradient(self, batch: Batch, scale: float) -> None:
        """Nothing is recorded."""

    def attach_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing is copied."""

    def bind_gradients(self) -> None:
        """A parameter that has no gradient in a step, such as an expert's, must not be moved by it."""

    def shrink(self) -> "GeneralEngine | None":
        """Recompute all layers, then halve the micro batch."""
        if self.may_recompute:
            recompute_layers(self.model)
            return replace(self, may_recompute=False)
        return replace(self, micro_batch=self.micro_batch // 2) if self.micro_batch > 1 else None

    def describe(self) -> str:
        """Say how it computes."""
        recomputed = ", layers recomputed" if self.model.is_gradient_checkpointing else ""
        return f"general engine, {self.micro_batch} row(s) a forward pass{recomputed}"

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def recompute_layers(model: PeftModel) -> None:
    """Have a model keep only its layers' inputs, and run them again in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@dataclass(frozen=True)
class FusedEngine:
    """The fused decoder: flat batches, no padding, logits at the trained positions alone."""

    decoder: Decoder
    device: torch.device
    tokens_per_forward: int
    num_recomputed: int
    """Layers that run again in the backward pass."""
    logits_bytes: int
    room_tokens: int
    """Tokens whose forward and backward pass fits into the memory: more than a step's where those are few."""
    recorder: PassRecorder | None = None
    """Of small passes on a GPU."""

    def form_step(self, table: TokenTable, rows: Sequence[Sequence[int]], *, num_parts: int = 1) -> list[Batch]:
        """Lay the step's examples end to end."""
        return form_flat_step(table, rows, self.tokens_per_forward, num_parts=num_parts)

    def form_evaluation(self, table: TokenTable) -> Iterator[Batch]:
        """Lay as many examples end to end as fit into the memory."""
        for rows in _cut_by_length(table, EVALUATION_ROWS):
            yield from form_flat_step(table, rows, self.room_tokens)

    def sum_losses(self, batch: Batch) -> Tensor:
        """Go through the fused decoder."""
        moved = batch.move(self.device)
        assert moved.segments is not None
        assert moved.trained is not None
        assert moved.position_ids is not None
        if self.decoder.dropout is not None:
            self.decoder.dropout.start_forward(batch.dropout_key)
        self.decoder.refresh()
        return sum_losses(
            self.decoder,
            moved.input_ids[0],
            moved.position_ids[0],
            moved.segments,
            moved.trained,
            moved.targets[0].index_select(0, moved.trained),
            num_recomputed=self.num_recomputed,
            logits_bytes=self.logits_bytes,
        )

    def replay_gradient(self, batch: Batch, scale: float) -> Tensor | None:
        """Replay a pass of this shape where it is a small one; see `passes`."""
        if self.recorder is None or not self.decoder.has_bound_gradients():
            return None
        assert batch.segments is not None
        assert batch.trained is not None
        assert batch.position_ids is not None
        flat = FlatBatch(
            batch.input_ids[0],
            batch.position_ids[0],
            batch.segments.lengths,
            batch.trained,
            batch.targets[0].index_select(0, batch.trained),
        )
        tokens = self.recorder.choose_shape(flat).num_tokens
        # What is recorded keeps its memory, beside that of the passes which are not.
        if tokens > self.recorder.most_tokens or 2 * tokens > self.room_tokens:
            return None
        return self.recorder.add_gradient(flat, scale, dropout_key=batch.dropout_key)

    def attach_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy the adapter anew after each step."""
        optimizer.register_step_post_hook(lambda *_: self.decoder.invalidate())

    def bind_gradients(self) -> Tensor | None:
        """Every trained matrix has a gradient in every step."""
        return self.decoder.bind_gradients()

    def shrink(self) -> "FusedEngine | None":
        """Recompute all layers, then halve the forward pass down to 512 tokens."""
        if self.num_recomputed < len(self.decoder.layers):
            return replace(self, num_recomputed=len(self.decoder.layers), recorder=None)
        if self.tokens_per_forward > 512:
            tokens = self.tokens_per_forward // 2
            return replace(self, tokens_per_forward=tokens, room_tokens=tokens, recorder=None)
        return None

    def describe(self) -> str:
        """Say how it computes."""
        recomputed = f", {self.num_recomputed} layers recomputed" if self.num_recomputed else ""
        attention = name_attention(self.decoder.attend)
        return f"fused engine, up to {self.tokens_per_forward:,} tokens a forward pass{recomputed}, {attention}"


def _cut_by_length(table: TokenTable, num_rows: int) -> Iterator[list[list[int]]]:
    """Give all examples, so many at a time, the longest first."""
    order = np.argsort(-table.lengths, kind="stable")
    for start in range(0, len(order), num_rows):
        yield [[int(index)] for index in order[start : start + num_rows]]
