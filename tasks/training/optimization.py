"""One optimizer step: gradients over its micro batches, clipped, and one move of the adapter."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.out_of_memory import is_out_of_memory
from tasks.training.batches import Batch
from tasks.training.distributed import count_sharing, gather, shard_batches, world_size
from tasks.training.memory import OutOfMemory, read_utilisation
from tasks.training.preparation import Setup
from tasks.training.records import TrainingError
from tasks.training.sharding import has_collective_passes, is_sharded


class Descent(NamedTuple):
    """What a step tells."""

    loss: float
    """Nats a trained token, where the objective is SFT's."""
    grad_norm: float
    """Before clipping."""
    figures: dict[str, float]
    """Of the objective."""
    utilisation: float | None
    """Of the GPU, while the step is computed; see `memory.read_utilisation`."""


def descend(setup: Setup, batches: list[Batch], learning_rate: float, *, step: int) -> Descent:
    """Accumulate the step's gradient over its micro batches, clip it, and move the adapter once.

    With several ranks each takes its share of the micro batches, and all end with the same adapter.

    Raises:
        TrainingError: no trained token, or a loss or gradient that is not finite; the adapter is then unchanged.
        OutOfMemory: a micro batch does not fit; the adapter is then unchanged.
    """
    num_trained_tokens = sum(batch.num_trained_tokens for batch in batches)
    if num_trained_tokens == 0:
        names = [name for batch in batches for name in batch.example_ids]
        raise TrainingError(f"step {step}: no trained token in examples {_list_names(names)}: remove them")
    size = sum(setup.objective.count(batch) for batch in batches)
    if not size > 0:
        names = [name for batch in batches for name in batch.example_ids]
        raise TrainingError(f"step {step}: all trained tokens of examples {_list_names(names)} weigh 0: remove them")
    sharing = count_sharing(setup.config)
    mine = shard_batches(batches, is_even=is_sharded(setup.config), num_sharing=sharing)
    loss_sums, figure_sums, shortage = _accumulate(setup, mine, size)
    if shortage and world_size() == 1:
        raise OutOfMemory(shortage)
    zero = torch.zeros((), device=setup.device)
    told = [sum(each, zero) for each in zip(*figure_sums, strict=True)]
    loss_sum, num_short, *told = setup.optimizer.sum(sum(loss_sums, zero), zero + bool(shortage), *told)
    grad_norm = setup.optimizer.clip()
    is_finite = torch.isfinite(loss_sum) & torch.isfinite(grad_norm) & (num_short == 0)
    if not shortage:  # where the memory is full, there is no room for the optimizer's first step either
        setup.optimizer.move(learning_rate, is_finite)
    utilisation = read_utilisation(setup.device)  # the driver takes milliseconds to answer: the device works meanwhile
    # The step's only wait for the device: all its numbers at once, with everything queued behind them.
    *sums, total, norm, short = torch.stack([*loss_sums, *told, loss_sum, grad_norm, num_short]).tolist()
    sums, figures = sums[: len(loss_sums)], sums[len(loss_sums) :]
    if short:
        raise OutOfMemory(shortage or "on another rank")
    if not (math.isfinite(total) and math.isfinite(norm)):
        own = [batch for batch, _ in mine[: len(sums)]]
        raise _explain(setup, own, sums, norm, learning_rate, step=step)
    named = zip(setup.objective.figures, figures, strict=True)
    return Descent(total / size, norm, {name: value / size for name, value in named}, utilisation)


def _accumulate(
    setup: Setup, shares: list[tuple[Batch, float]], size: float
) -> tuple[list[Tensor], list[Tensor], str | None]:
    """Add up the gradient over micro batches; return their sums, and what was said where one did not fit.

    The sums are those of the losses, scalars, and of the objective's figures, [K] each.
    """
    objective = setup.objective
    loss_sums: list[Tensor] = []
    figure_sums = [torch.zeros(len(objective.figures), device=setup.device)]
    try:
        for number, (whole, weight) in enumerate(shares, start=1):
            batch = setup.engine.take_part(whole)
            is_plain = objective.is_plain(batch)
            loss_sum = setup.engine.replay_gradient(batch, weight / size) if is_plain else None
            if loss_sum is None:
                log_probs = setup.engine.compute_log_probs(batch)
                loss_sum = weight * objective.sum_losses(log_probs, batch)
                if objective.sum_figures is not None:
                    figure_sums.append(weight * objective.sum_figures(log_probs.detach(), batch))
                del log_probs
                setup.optimizer.add(loss_sum / size, is_last=number == len(shares))
            loss_sums.append(loss_sum.detach())
            del loss_sum  # with its graph: a pass cannot be recorded while another one's leaves are held
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or has_collective_passes(
            setup.config
        ):  # the others wait in the middle of a pass
            raise
        # The words alone: the error itself holds on to what filled the memory.
        return loss_sums, figure_sums, str(error).partition("\n")[0]
    return loss_sums, figure_sums, None


def _explain(
    setup: Setup, batches: list[Batch], sums: list[float], norm: float, learning_rate: float, *, step: int
) -> TrainingError:
    """Return the error that names the step, and the examples of the ranks on which a loss is not finite."""
    wrong = [batch for batch, value in zip(batches, sums, strict=True) if not math.isfinite(value)]
    named = [pair for batch in wrong or batches for pair in zip(batch.example_ids, batch.indices, strict=True)]
    names = [name for name, _ in named]
    if wrong and not is_sharded(setup.config):
        names = _find_culprits(setup, named) or names
    what = "the loss" if wrong else "the gradient's norm"
    message = (
        f"step {step}: {what} is not finite (losses {sums}, gradient norm {norm}, learning rate {learning_rate:.3g}) "
        f"on examples {_list_names(names)}: look at these examples, lower training.learning_rate, or set "
        "training.precision to fp32"
    )
    answers = gather((bool(wrong), message))
    return TrainingError(next((text for is_cause, text in answers if is_cause), answers[0][1]))


@torch.no_grad()
def _find_culprits(setup: Setup, named: list[tuple[str, int]]) -> list[str]:
    """Return those of the examples, each with its number, whose own loss is not finite."""
    culprits = []
    for name, index in named:
        losses = [setup.engine.sum_losses(batch) for batch in setup.engine.form_step(setup.table, [[index]])]
        if not all(torch.isfinite(loss).item() for loss in losses):
            culprits.append(name)
    return culprits


def _list_names(names: list[str]) -> str:
    """List ids of examples, at most sixteen."""
    return ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
