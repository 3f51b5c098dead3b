"""The engine of every model that the fused decoder does not know: the model's own forward pass.

Examples lie end to end where a trial has shown that the family keeps them apart, and are padded side by side, long ones
with long ones, where not.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from schemas.plurals import count_of
from tasks.decoder.attention import Attention, name_attention
from tasks.decoder.decoder import choose_operations
from tasks.training.batches import Batch, form_batch, form_flat_batch
from tasks.training.engines.chunked_head import LOGITS_BYTES, compute_chunked_losses, is_head_frozen
from tasks.training.engines.flat_attention import FlatLayout, laid_out
from tasks.training.engines.loss import compute_token_losses
from tasks.training.engines.router_loss import RouterLoss
from tasks.training.methods import find_base
from tasks.training.micro_batches import form_flat_step, form_padded_pairs, form_padded_step
from tasks.training.token_table import TokenTable, cut_by_length

# Tokens of a flat pass below which nothing is gained by making it smaller.
_LEAST_TOKENS = 64


@dataclass(frozen=True)
class GeneralEngine:
    """Any causal language model of transformers."""

    model: Any
    """The base with its adapter, or what divides it among ranks."""
    base: Any
    """The base within it."""
    device: torch.device
    dtype: torch.dtype
    micro_batch: int
    """Most rows of a padded pass."""
    tokens_per_forward: int
    """Most tokens of a pass, padding included, where it has more than one example."""
    room_tokens: int
    """Tokens whose forward and backward pass fits into the memory: more than a step's where those are few."""
    attend: Attention | None = None
    """Of examples end to end; None: they are padded side by side."""
    has_chunked_head: bool = True
    """Whether the head runs on some trained positions at a time, else on all positions at once."""
    is_head_whole: bool = False
    """Whether the head is frozen and lies whole on the device."""
    keeps_packs: bool = True
    """Whether examples in one padded row stay apart; where not, a pack's examples get rows of their own."""
    layers: tuple[nn.Module, ...] = ()
    """That can run again in the backward pass."""
    num_recomputed: int = 0
    """Of the layers, from the first, that do."""
    may_recompute: bool = False
    """Whether more of them may, where the memory is short."""
    logits_bytes: int = LOGITS_BYTES
    router_loss: RouterLoss | None = None
    """Added to the loss where gradients are taken."""

    @property
    def num_layers(self) -> int:
        """Return how many layers can run again in the backward pass."""
        return len(self.layers)

    @property
    def recomputed_part(self) -> float:
        """Of the layers, those that run again in the backward pass."""
        return self.num_recomputed / max(1, self.num_layers)

    @property
    def recording(self) -> None:
        """No pass is recorded."""
        return

    @property
    def long_ways(self) -> tuple[int, int]:
        """Nothing is done for long examples alone."""
        return 0, 0

    @property
    def is_flat(self) -> bool:
        """Whether examples lie end to end."""
        return self.attend is not None

    def form_step(self, table: TokenTable, rows: Sequence[Sequence[int]], *, num_parts: int = 1) -> list[Batch]:
        """Lay the step's examples end to end, or side by side."""
        return self._form(table, rows, self.tokens_per_forward, num_parts)

    def form_evaluation(self, table: TokenTable) -> Iterator[Batch]:
        """Make batches of all examples, those of like length together."""
        for rows in cut_by_length(table):
            yield from self._form(table, rows, self.room_tokens, 1)

    def form_trial(self, table: TokenTable) -> Batch:
        """Make one batch of all examples, whatever its size."""
        indices = range(len(table.example_ids))
        return (
            form_batch(table, [[index] for index in indices])
            if self.attend is None
            else form_flat_batch(table, indices)
        )

    def sum_losses(self, batch: Batch) -> Tensor:
        """Return the sum of -log p, each trained position alike."""
        return -self.compute_log_probs(batch).sum()

    def take_part(self, batch: Batch) -> Batch:
        """Return the batch: no ranks share its tokens here."""
        return batch

    def compute_log_probs(self, batch: Batch) -> Tensor:
        """Go through the model's own forward pass, in 16-bit products where the base is 16-bit."""
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < self.num_recomputed  # type: ignore[assignment]
        moved = batch.move(self.device)
        with autocast_to(self.dtype, self.device), self._lay_out(moved):
            if self.router_loss is None or not torch.is_grad_enabled():
                return self._compute_log_probs(moved)
            with self.router_loss.recorded() as seen:
                log_probs = self._compute_log_probs(moved)
            return log_probs - self.router_loss.share_out(seen, moved)

    def _compute_log_probs(self, batch: Batch) -> Tensor:
        if not self.has_chunked_head:
            return -compute_token_losses(self.model, batch)
        return -compute_chunked_losses(
            self.model,
            self.base,
            batch,
            is_frozen=self.is_head_whole,
            ops=choose_operations(self.device, self.dtype),
            logits_bytes=self.logits_bytes,
        )

    def replay_gradient(self, batch: Batch, scale: float) -> Tensor | None:
        """Return None: nothing is recorded."""
        return None

    def attach_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing is copied."""

    def bind_gradients(self) -> None:
        """A parameter that has no gradient in a step, such as an expert's, must not be moved by it."""

    def shrink(self) -> "GeneralEngine | None":
        """Recompute all layers, then halve the forward pass."""
        if self.may_recompute and self.num_recomputed < len(self.layers):
            return replace(self, num_recomputed=len(self.layers))
        if self.attend is None and self.micro_batch == 1:
            return None
        if self.attend is not None and self.tokens_per_forward <= _LEAST_TOKENS:
            return None
        tokens = self.tokens_per_forward // 2
        return replace(self, micro_batch=max(1, self.micro_batch // 2), tokens_per_forward=tokens, room_tokens=tokens)

    def describe(self) -> str:
        """Say how it computes."""
        recomputed = f", {self.num_recomputed} layers recomputed" if self.num_recomputed else ""
        if self.attend is None:
            rows = count_of(self.micro_batch, "row")
            how = f"up to {rows} side by side and {self.tokens_per_forward:,} tokens a forward pass"
        else:
            how = f"up to {self.tokens_per_forward:,} tokens end to end a forward pass"
            recomputed += f", {name_attention(self.attend)}"
        return f"general engine, {how}{recomputed}"

    def _form(self, table: TokenTable, rows: Sequence[Sequence[int]], tokens: int, num_parts: int) -> list[Batch]:
        if self.attend is not None:
            return form_flat_step(table, rows, tokens, num_parts=num_parts)
        if table.group > 1:
            return form_padded_pairs(table, rows, self.micro_batch, tokens)
        if not self.keeps_packs:
            rows = [[index] for row in rows for index in row]
        return form_padded_step(table, rows, max(1, min(self.micro_batch, len(rows) // num_parts)), tokens)

    def _lay_out(self, batch: Batch) -> AbstractContextManager[None]:
        if self.attend is None:
            return nullcontext()
        assert batch.segments is not None
        return laid_out(FlatLayout(batch.segments, self.attend))


def build_engine(
    model: Any, *, device: torch.device, dtype: torch.dtype, micro_batch: int, tokens_per_forward: int
) -> GeneralEngine:
    """Return the engine that pads and computes the whole head: what any family allows, and nothing has to prove.

    Args:
        model: with an adapter or without.
        device: to compute on.
        dtype: of the products.
        micro_batch: most rows of a forward pass.
        tokens_per_forward: most tokens of a forward pass of more than one row, padding included.
    """
    base = find_base(model)
    if dtype != torch.float32:
        # Under autocast, PEFT's own cast of a layer's input to the adapter's fp32 is undone by the next product.
        for module in base.modules():
            if isinstance(module, LoraLayer) and not any(module.use_dora.values()):
                module.cast_input_dtype_enabled = False
    return GeneralEngine(
        model,
        base,
        device,
        dtype,
        micro_batch,
        tokens_per_forward,
        tokens_per_forward,
        has_chunked_head=False,
        is_head_whole=is_head_frozen(base),
        layers=prepare_recomputation(base),
    )


def prepare_recomputation(base: Any) -> tuple[nn.Module, ...]:
    """Return the text decoder's layers that can run again in the backward pass, none of which does yet."""
    if not base.supports_gradient_checkpointing:
        return ()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.disable_input_require_grads()  # reentrant checkpoints alone want it
    for module in base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    decoder = base.get_decoder() or base
    return tuple(module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer))


def autocast_to(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which products are in a 16-bit dtype; for fp32, none."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
