"""The losses of any causal language model's trained positions, whose logits exist for some rows at a time.

Two steps, both through the model's own code, so that whatever a family does to its logits (scale, soft cap) is done as
it does it: the layers run once and their states are kept; then the model's outer part, the head, runs on some of the
trained states at a time, with the kept states in place of the layers.

Dimensions: `B` rows, `S` tokens a row, `N` trained positions, `H` hidden size, `V` vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)
from torch.utils.checkpoint import checkpoint

from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.batches import Batch
from tasks.training.engines.loss import find_chosen

# Of logits that exist at a time: enough rows to fill a GPU's products.
LOGITS_BYTES = 1 << 28
_LEAST_ROWS = 64

Tail = Callable[[Tensor], Tensor]
"""States [N, H] -> logits [N, V]"""


class HeadError(ValueError):
    """The model's head does not stand apart from its layers; the message says how."""


def is_head_frozen(base: Any) -> bool:
    """Say whether nothing outside a model's layers is trained."""
    inside = {id(module) for module in base.base_model.modules()}
    outside = (module for module in base.modules() if module is not base and id(module) not in inside)
    return not any(parameter.requires_grad for module in outside for parameter in module.parameters(recurse=False))


def compute_chunked_losses(
    model: nn.Module, base: Any, batch: Batch, *, is_frozen: bool, ops: ModuleType, logits_bytes: int = LOGITS_BYTES
) -> Tensor:
    """Return -log p(target) of the chosen positions [N] (nats, fp32); 0 where a target does not count.

    Their weights come with the backward pass.

    Args:
        model: what a forward pass is asked of: the base with its adapter, perhaps divided among ranks.
        base: the causal language model of transformers within it.
        batch: on the model's device.
        is_frozen: whether the head is, and lies whole on this device: its gradient is then made with the loss. Where
            it is not, the head runs again in the backward pass.
        ops: `elementwise` or `kernels`, for the model's device.
        logits_bytes: of logits that exist at a time.

    Raises:
        HeadError: this model's head cannot be computed for chosen states.
    """
    inner, own = base.base_model, base.forward
    if inner is base:
        raise HeadError("its head is not apart from its layers")

    def compute(**arguments: Any) -> Tensor:
        outputs = _run_layers(own, inner, arguments)
        states, targets = outputs.last_hidden_state.flatten(0, 1), batch.targets.flatten()
        chosen = find_chosen(batch)
        states, targets = states.index_select(0, chosen), targets.index_select(0, chosen)
        tail = partial(_run_head, own, inner, arguments, outputs)
        chunk = max(_LEAST_ROWS, logits_bytes // (base.config.get_text_config().vocab_size * states.element_size()))
        if is_frozen:
            losses: Tensor = _FrozenHeadLoss.apply(states, targets, tail, chunk, ops)
            return losses
        return _compute_with_trained_head(states, targets, tail, chunk)

    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    # Within the model's own call, so that whatever wraps it (an adapter, FSDP, ZeRO) has its weights at hand.
    with _replaced(base, compute):
        result: Tensor = model(**arguments)
    return result


class _FrozenHeadLoss(torch.autograd.Function):
    """-log p(target) [N] of states [N, H], with each one's gradient made while the logits are there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, tail: Tail, chunk: int, ops: ModuleType) -> Tensor:
        """Compute some rows' logits, loss and gradient at a time."""
        needs_grad = ctx.needs_input_grad[0]
        grads = torch.empty_like(states) if needs_grad else None
        losses = [torch.zeros(0, dtype=torch.float32, device=states.device)]
        for start in range(0, len(states), chunk):
            stop = start + chunk
            with torch.set_grad_enabled(needs_grad):
                rows = states[start:stop].detach().requires_grad_(needs_grad)
                logits = tail(rows)
            grad = logits.detach()
            losses.append(ops.cross_entropy(grad, targets[start:stop]))
            if grads is not None:
                # The gradient stands in the logits' place now; where the model needs them, autograd refuses.
                torch.autograd.graph.increment_version(grad)
                (grads[start:stop],) = torch.autograd.grad(logits, rows, grad)
            del logits, grad, rows
        ctx.save_for_backward(grads)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Weigh the rows of the gradient that the forward pass has made."""
        (rows,) = ctx.saved_tensors
        # In the gradient's fp32: one over the step's tokens, rounded to 16 bits, would tilt all of them the same way.
        return (rows.to(grad.dtype) * grad[:, None]).to(rows.dtype), None, None, None, None


def _compute_with_trained_head(states: Tensor, targets: Tensor, tail: Tail, chunk: int) -> Tensor:
    """Return the losses [N], with the head run again, some rows at a time, in the backward pass."""

    def compute(rows: Tensor, row_targets: Tensor) -> Tensor:
        return F.cross_entropy(tail(rows).float(), row_targets, ignore_index=IGNORE_INDEX, reduction="none")

    losses = [0.0 * states[:0].float().sum(dim=1)]
    if len(states):
        for rows, row_targets in zip(states.split(chunk), targets.split(chunk), strict=True):
            losses.append(checkpoint(compute, rows, row_targets, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(losses)


def _run_layers(own: Callable[..., Any], inner: Any, arguments: dict[str, Any]) -> Any:
    """Return the output of a model's layers, called as the model calls them; its head sees no row."""
    run, found = inner.forward, []

    def keep(*given: Any, **named: Any) -> Any:
        outputs = run(*given, **named)
        if getattr(outputs, "last_hidden_state", None) is None:
            raise HeadError("its layers give no last hidden state")
        found.append(outputs)
        return _with_states(outputs, outputs.last_hidden_state[:, :0])

    with _replaced(inner, keep):
        own(**arguments)
    if len(found) != 1:
        raise HeadError("its layers are not run once")
    return found[0]


def _run_head(own: Callable[..., Any], inner: Any, arguments: dict[str, Any], outputs: Any, rows: Tensor) -> Tensor:
    """Return the logits [N, V] of states [N, H]."""
    with _replaced(inner, lambda *_, **__: _with_states(outputs, rows[None])):
        logits: Tensor = own(**arguments).logits[0]
    return logits


def _with_states(outputs: Any, states: Tensor) -> Any:
    """Return a copy of the layers' output with other states."""
    changed = copy.copy(outputs)
    changed.last_hidden_state = states
    return changed


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a module do something else for a while."""
    had_own = "forward" in vars(module)
    own = module.forward
    module.forward = forward
    try:
        yield
    finally:
        if had_own:
            module.forward = own
        else:
            del module.forward
