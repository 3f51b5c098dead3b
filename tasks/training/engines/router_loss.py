"""The routers' auxiliary loss (Fedus et al., 2021), which keeps a mixture of experts from leaving experts idle.

    loss of a step = mean over its trained tokens of -log p(token) + coefficient * auxiliary loss

The formula is the family's own function in transformers. The routers' logits are taken from the layers as they run, so
that the loss is the same whatever way an engine takes through the model. Padding does not count.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from schemas.config import TrainingConfig
from tasks.decoder.attention import send
from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.batches import Batch
from tasks.training.records import TrainingError


@dataclass(frozen=True)
class RouterLoss:
    """What a model's auxiliary loss is computed by."""

    coefficient: float
    compute: Callable[..., Tensor]
    """transformers' function of the family."""
    num_experts: int
    top_k: int
    routers: tuple[nn.Module, ...]
    """In the order of the layers."""
    place: int
    """Of the logits [tokens, E] among a router's results."""

    @contextmanager
    def recorded(self) -> Iterator[dict[int, Tensor]]:
        """Give the logits of each router's first run, by its number; layers that run again do not count."""
        seen: dict[int, Tensor] = {}

        def take(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                seen.setdefault(number, output[self.place])

            return hook

        handles = [router.register_forward_hook(take(number)) for number, router in enumerate(self.routers)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def share_out(self, seen: dict[int, Tensor], batch: Batch) -> Tensor:
        """Return what each of the N chosen positions' loss grows by: the weighted loss where there is a target, else 0.

        Whatever the targets weigh, a mean over them then grows by the coefficient times the auxiliary loss.
        """
        logits = tuple(seen[number].flatten(0, -2) for number in sorted(seen))
        loss = self.coefficient * self.compute(logits, self.num_experts, self.top_k, _mask_padding(batch))
        targets = batch.targets[0].index_select(0, batch.trained) if batch.trained is not None else batch.targets
        is_target = targets != IGNORE_INDEX
        return loss * (is_target if batch.trained is not None else is_target[is_target])


def find_router_loss(base: Any, config: TrainingConfig) -> RouterLoss | None:
    """Return a model's auxiliary loss as the config, or else the model's own one, asks for it; None where neither does.

    Args:
        base: causal language model of transformers.
        config: the training section.

    Raises:
        TrainingError: the config asks for it, and the model has none.
    """
    text = base.config.get_text_config()
    if config.is_paired:  # a loss a token would be a part of the pairs' margins
        return None
    coefficient = config.router_aux_loss_coef
    if coefficient is None:
        own = getattr(text, "router_aux_loss_coef", None)
        coefficient = float(own or 0.0) if getattr(text, "output_router_logits", False) else 0.0
    if not coefficient:
        return None
    recorder = (getattr(base.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    compute = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    kind = getattr(recorder, "target_class", None)
    routers = tuple(module for module in base.modules() if kind is not None and isinstance(module, kind))
    if compute is None or not routers:
        raise TrainingError(
            f"training.router_aux_loss_coef is {coefficient:g}, but this {type(base).__name__} has no auxiliary loss "
            "in transformers: set it to 0"
        )
    num_experts = getattr(base, "num_experts", None) or text.num_experts
    top_k = getattr(base, "num_experts_per_tok", None) or text.num_experts_per_tok
    return RouterLoss(coefficient, compute, int(num_experts), int(top_k), routers, int(getattr(recorder, "index", 0)))


def _mask_padding(batch: Batch) -> Tensor | None:
    """Return ones [B, S] where tokens are, zeros on padding; None where there is none."""
    num_places = batch.input_ids.shape[1]
    if all(length == num_places for length in batch.row_lengths):
        return None
    lengths = send(torch.tensor(batch.row_lengths), batch.input_ids.device)
    return (torch.arange(num_places, device=lengths.device)[None] < lengths[:, None]).long()
