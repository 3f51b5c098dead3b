"""One step, one evaluation, one checkpoint of a training; again in smaller pieces where the memory is short."""

import gc
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from tasks.decoder.passes import Shape
from tasks.out_of_memory import is_out_of_memory
from tasks.training.batches import Batch
from tasks.training.checkpoints import Progress, take_snapshot
from tasks.training.distributed import check_ranks_agree, count_sharing, find_turn, gather, share_table
from tasks.training.memory import OutOfMemory, read_memory, reset_memory
from tasks.training.micro_batches import iterate_steps
from tasks.training.optimization import descend
from tasks.training.preparation import Setup
from tasks.training.records import EvalRecord, StepRecord, TrainingError
from tasks.training.schedule import compute_learning_rate
from tasks.training.sharding import has_collective_passes, is_sharded
from tasks.training.step_plans import find_row_parts
from tasks.training.step_work import count_work
from tasks.training.validation import sum_held_out
from tasks.training.writing import CheckpointWriter

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass
class Run:
    """A training under way. An out-of-memory error replaces `setup` by one with smaller micro batches."""

    setup: Setup
    progress: Progress
    identity: str
    warnings: list[str] = field(default_factory=list)
    peak_memory_bytes: int = 0
    recorded: set[Shape] = field(default_factory=set)
    """Shapes of passes that were recorded."""
    saved_step: int = 0
    """Step of the newest checkpoint."""
    tokens_per_second_at_peak: float | None = None
    """Speed of all ranks if they did nothing but useful matrix products; none when not measured."""


def iterate(run: Run) -> Iterator[list[Batch]]:
    """Give the micro batches of the steps that are still to be done."""
    setup = run.setup
    turn = find_turn(count_sharing(setup.config))
    num_parts = turn[1] if find_row_parts(setup.rows) is None else 1  # else a rank forms its own batches only
    steps = iterate_steps(
        setup.table,
        setup.rows,
        setup.config,
        seed=setup.seed,
        first=run.progress.step,
        last=setup.num_steps,
        form_step=partial(setup.engine.form_step, num_parts=num_parts),
        turn=turn,
    )
    return look_ahead(steps)


def look_ahead(steps: Iterator[Item]) -> Iterator[Item]:
    """Make the next step's batches while this step is computed: a GPU that waits for them stands still."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, steps, None)
        while (found := upcoming.result()) is not None:
            upcoming = pool.submit(next, steps, None)
            yield found


def do_step(run: Run, steps: Iterator[list[Batch]]) -> tuple[StepRecord, Iterator[list[Batch]]]:
    """Do one optimizer step and count it; where it does not fit into the memory, do it again in smaller micro batches.

    Returns:
        The record, and the steps that follow.
    """
    setup, progress = run.setup, run.progress
    reset_memory(setup.device)
    started = time.perf_counter()
    batches = next(steps)
    learning_rate = compute_learning_rate(progress.step, setup.num_steps, setup.config)
    shortage = None
    try:
        loss, grad_norm, figures, utilisation = descend(setup, batches, learning_rate, step=progress.step + 1)
    except OutOfMemory as error:
        shortage = str(error)
    if shortage is not None:
        shrink(run, shortage)
        return do_step(run, iterate(run))
    seconds = time.perf_counter() - started
    num_tokens = sum(batch.num_tokens for batch in batches)
    num_trained_tokens = sum(batch.num_trained_tokens for batch in batches)
    progress.step += 1
    progress.losses.append(loss)
    progress.num_tokens += num_tokens
    progress.num_trained_tokens += num_trained_tokens
    progress.train_seconds += seconds
    memory_bytes = read_memory(setup.device)
    run.peak_memory_bytes = max(run.peak_memory_bytes, memory_bytes)
    tokens_per_second = num_tokens / max(seconds, 1e-9)
    peak = run.tokens_per_second_at_peak
    record = StepRecord(
        step=progress.step,
        num_steps=setup.num_steps,
        epoch=progress.step / setup.steps_per_epoch,
        loss=loss,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        num_tokens=num_tokens,
        num_trained_tokens=num_trained_tokens,
        tokens_per_second=tokens_per_second,
        memory_bytes=memory_bytes,
        utilisation=utilisation,
        share_of_peak=None if peak is None else tokens_per_second / peak,
        figures=figures,
        work=count_work(batches, setup.engine.recording, run.recorded),
    )
    return record, steps


def shrink(run: Run, shortage: str) -> None:
    """Go on with smaller micro batches, and say so.

    Raises:
        TrainingError: they are as small as they get.
    """
    release_memory(run.setup)
    before = run.setup.engine.describe()
    smaller = step_down(run.setup)
    if smaller is None:
        raise TrainingError(
            f"step {run.progress.step + 1}: out of memory with the smallest forward pass ({shortage}): set "
            "training.gradient_checkpointing, lower training.tokens_per_pack or tokenization.max_length, or have GPUs "
            "share examples by training.context_parallel"
        )
    run.setup = smaller
    message = (
        f"step {run.progress.step + 1}: out of memory with the {before} ({shortage}): went on with the "
        f"{smaller.engine.describe()}, the same rows a step"
    )
    logger.warning(message)
    run.warnings.append(message)


def step_down(setup: Setup) -> Setup | None:
    """Return the training with an engine that takes less memory, or None where there is none.

    A step keeps its rows, so that the sum that is optimized stays the same.
    """
    engine = setup.engine.shrink()
    return None if engine is None else replace(setup, engine=engine)


def release_memory(setup: Setup) -> None:
    """Drop what a step that failed has left."""
    setup.optimizer.forget()
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()


def save(run: Run, writer: CheckpointWriter) -> None:
    """Copy the training's state and begin to write it."""
    if run.setup.config.is_lora or not is_sharded(run.setup.config):  # else no rank holds what another does
        check_ranks_agree(run.setup.parameters, step=run.progress.step)
    parameters, optimizer = run.setup.optimizer.unsharded()
    run.progress.warnings = list(run.warnings)
    snapshot = take_snapshot(parameters=parameters, optimizer=optimizer, progress=run.progress, identity=run.identity)
    if snapshot is not None:
        writer.write(snapshot)
    run.saved_step = run.progress.step


def evaluate(run: Run) -> EvalRecord:
    """Compute the held-out loss and add it to the progress.

    Raises:
        TrainingError: it is not finite.
    """
    setup, progress = run.setup, run.progress
    loss, *figures = _average_held_out(run)
    run.peak_memory_bytes = max(run.peak_memory_bytes, read_memory(setup.device))
    if not math.isfinite(loss):
        raise TrainingError(f"step {progress.step}: the held-out loss is {loss}: lower training.learning_rate")
    since = progress.losses[progress.evaluations[-1].step if progress.evaluations else 0 :]
    record = EvalRecord(
        step=progress.step,
        num_steps=setup.num_steps,
        epoch=progress.step / setup.steps_per_epoch,
        loss=loss,
        train_loss=sum(since) / len(since),
        is_best=all(loss < earlier.loss for earlier in progress.evaluations),
        figures=dict(zip(setup.objective.figures, figures, strict=True)),
    )
    progress.evaluations.append(record)
    return record


def _average_held_out(run: Run) -> list[float]:
    """Return the held-out loss and figures over all ranks' shares; where it does not fit, in smaller micro batches."""
    setup = run.setup
    assert setup.eval_table is not None
    sums, shortage = np.zeros(2 + len(setup.objective.figures)), None
    try:
        for table, counts in share_table(setup.eval_table, count_sharing(setup.config)):
            is_even = is_sharded(setup.config)
            found = sum_held_out(setup.model, setup.engine, table, setup.objective, is_even=is_even)
            sums += found if counts else 0.0
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or has_collective_passes(
            setup.config
        ):  # the others wait in the middle of a pass
            raise
        shortage = str(error).partition("\n")[0]
    shares = gather((sums, shortage))
    shortages = [share[1] for share in shares if share[1] is not None]
    if shortages:
        shrink(run, shortages[0])
        setup.model.train()
        return _average_held_out(run)
    loss, count, *figures = np.sum([share[0] for share in shares], axis=0)
    return [float(value) / float(count) for value in (loss, *figures)]
