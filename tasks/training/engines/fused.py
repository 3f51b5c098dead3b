"""The engine that runs a model's layers through the fused decoder; see `tasks.decoder`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tasks.decoder.across import AcrossRanks
from tasks.decoder.attention import name_attention
from tasks.decoder.decoder import Decoder, compute_losses
from tasks.decoder.host_inputs import HostMemory
from tasks.decoder.passes import FlatBatch, PassRecorder, RecordingRule
from tasks.decoder.pieces import PIECE_TOKENS
from tasks.training.batches import Batch, form_flat_batch
from tasks.training.engines.router_loss import RouterLoss
from tasks.training.micro_batches import form_flat_step
from tasks.training.slices import take_slice
from tasks.training.step_work import choose_recorded
from tasks.training.token_table import TokenTable, cut_by_length


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
    router_loss: RouterLoss | None = None
    """Added to the loss where gradients are taken."""
    piece_tokens: int = 0
    """Of the pieces in which layers that run again compute their gated layer; 0: whole."""
    num_in_host: int = 0
    """Of the layers that run again, those whose input lies in the host's memory."""
    host: HostMemory | None = None
    """Where they lie."""
    longest_fit: int = 0
    """Tokens of the longest example that fits, where the longest of the training cannot; 0: it does, or may."""
    context: tuple[int, int] | None = None
    """This rank's number, and how many there are, where ranks share the tokens of a batch; see `shared_tokens`."""

    @property
    def recording(self) -> RecordingRule | None:
        """Which passes are recorded; None where none is."""
        if self.recorder is None:
            return None
        return RecordingRule(self.recorder.most_tokens, self.recorder.longest, self.room_tokens)

    @property
    def recomputed_part(self) -> float:
        """Of the layers, those that run again in the backward pass."""
        return self.num_recomputed / max(1, self.num_layers)

    @property
    def is_flat(self) -> bool:
        """Whether examples lie end to end."""
        return True

    def form_step(self, table: TokenTable, rows: Sequence[Sequence[int]], *, num_parts: int = 1) -> list[Batch]:
        """Lay the step's examples end to end."""
        return form_flat_step(table, rows, self.tokens_per_forward, num_parts=num_parts)

    def take_part(self, batch: Batch) -> Batch:
        """Return this rank's slice of a batch, where ranks share its tokens."""
        return batch if self.context is None else take_slice(batch, *self.context)

    @property
    def num_layers(self) -> int:
        """Return how many layers can run again in the backward pass."""
        return len(self.decoder.layers)

    def form_trial(self, table: TokenTable) -> Batch:
        """Make one batch of all examples, whatever its size."""
        return form_flat_batch(table, range(len(table.example_ids)))

    def form_evaluation(self, table: TokenTable) -> Iterator[Batch]:
        """Lay as many examples end to end as fit into the memory."""
        for rows in cut_by_length(table):
            yield from form_flat_step(table, rows, self.room_tokens)

    def sum_losses(self, batch: Batch) -> Tensor:
        """Return the sum of -log p, each trained position alike."""
        return -self.compute_log_probs(batch).sum()

    def compute_log_probs(self, batch: Batch) -> Tensor:
        """Go through the fused decoder."""
        moved = self._start(batch)
        if self.router_loss is None or not torch.is_grad_enabled():
            return -self._compute_losses(moved)
        with self.router_loss.recorded() as seen:
            losses = self._compute_losses(moved, runs_all=True)
        return -losses - self.router_loss.share_out(seen, moved)

    def _start(self, batch: Batch) -> Batch:
        """Return a batch on the device; the decoder is ready for it then."""
        if self.decoder.dropout is not None:
            self.decoder.dropout.start_forward(batch.dropout_key)
        self.decoder.refresh()
        return batch.move(self.device)

    def _compute_losses(self, batch: Batch, *, runs_all: bool = False, scale: Tensor | None = None) -> Tensor:
        assert batch.segments is not None
        assert batch.trained is not None
        assert batch.position_ids is not None
        return compute_losses(
            self.decoder,
            batch.input_ids[0],
            batch.position_ids[0],
            batch.segments,
            batch.trained,
            batch.targets[0].index_select(0, batch.trained),
            num_recomputed=self.num_recomputed,
            logits_bytes=self.logits_bytes,
            runs_all=runs_all,
            scale=scale,
            piece_tokens=self.piece_tokens,
            host=self.host,
            num_in_host=self.num_in_host,
        )

    def replay_gradient(self, batch: Batch, scale: float) -> Tensor | None:
        """Replay a pass of this shape where it is a small one (see `passes`); do it at once where a head is trained.

        That head's gradient is made with the losses, since it is known what these weigh.
        """
        if not self.decoder.has_bound_gradients():
            return None
        loss = self._replay(batch, scale)
        if loss is None and self.router_loss is None and self.decoder.list_head_parameters():
            factor = torch.full((), scale, device=self.device)  # filled there: a copy would wait for the device
            loss = self._compute_losses(self._start(batch), scale=factor).sum()
            (loss * factor).backward()
            return loss.detach()
        return loss

    def _replay(self, batch: Batch, scale: float) -> Tensor | None:
        if self.recorder is None:
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
        if choose_recorded(self.recording, batch) is None:
            return None
        return self.recorder.add_gradient(flat, scale, dropout_key=batch.dropout_key)

    def attach_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the working copies of what is trained anew after each step."""
        optimizer.register_step_post_hook(lambda *_: self.decoder.invalidate())

    def bind_gradients(self) -> Tensor | None:
        """Everything that is trained has a gradient in every step."""
        return self.decoder.bind_gradients()

    def shrink(self) -> "FusedEngine | None":
        """Recompute all layers, then take long passes in pieces, then halve passes down to 512 tokens."""
        if self.num_recomputed < len(self.decoder.layers):
            return replace(self, num_recomputed=len(self.decoder.layers), recorder=None)
        is_long = self.tokens_per_forward > PIECE_TOKENS
        if is_long and not self.piece_tokens and any(layer.can_run_in_pieces for layer in self.decoder.layers):
            return replace(self, piece_tokens=PIECE_TOKENS, recorder=None)
        if self.tokens_per_forward > 512:
            tokens = self.tokens_per_forward // 2
            return replace(self, tokens_per_forward=tokens, room_tokens=tokens, recorder=None)
        return None

    @property
    def long_ways(self) -> tuple[int, int]:
        """What is done for long examples alone: tokens of a piece, and layers whose inputs lie in the host's memory."""
        return self.piece_tokens, self.num_in_host

    def describe_long(self) -> str:
        """Say what is done for the sake of long examples alone; nothing where that is nothing."""
        parts = []
        if self.piece_tokens:
            parts.append(f"gated layers in pieces of {self.piece_tokens:,} tokens")
        if self.num_in_host:
            parts.append(f"inputs of {self.num_in_host} layers in the host's memory")
        return ", ".join(parts)

    def describe(self) -> str:
        """Say how it computes."""
        recomputed = f", {self.num_recomputed} layers recomputed" if self.num_recomputed else ""
        attend = self.decoder.attend
        how = name_attention(attend.inner if isinstance(attend, AcrossRanks) else attend)
        if long := self.describe_long():
            how += f", {long}"
        if self.context is not None:
            how += f", {self.context[1]} ranks share its tokens"
        if self.decoder.divided is not None:
            how += f", {self.decoder.divided.describe()}"
        return f"fused engine, up to {self.tokens_per_forward:,} tokens a forward pass{recomputed}, {how}"
