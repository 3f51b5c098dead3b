"""Supervised fine-tuning of an adapter: the loop that the pipeline runs.

    loss of a step = sum of -log p(token) over its trained tokens / number of those tokens

over all micro batches of the step together, so that accumulation, padding, packing and a short last step change nothing
about what is optimized. `reference.py` is the same training in the plainest form; tests hold the two together.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch

from schemas.config import TrainingConfig
from tasks.tokenization.packing import packing_efficiency
from tasks.training.batches import Batch, choose_pack_tokens, iterate_steps
from tasks.training.checkpoints import (
    CheckpointError,
    Progress,
    find_checkpoint,
    name_checkpoint,
    read_trained,
    restore_checkpoint,
    save_checkpoint,
)
from tasks.training.curves import open_tensorboard
from tasks.training.lora import save_adapter, write_trained
from tasks.training.optimization import descend
from tasks.training.preparation import Setup, prepare_training
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingOutcome
from tasks.training.schedule import compute_learning_rate
from tasks.training.validation import compute_eval_loss, count_evals_since_best, find_overfitting

__all__ = ["CheckpointError", "EvalRecord", "StepRecord", "TrainingError", "TrainingOutcome", "train_adapter"]

logger = logging.getLogger(__name__)

OnStep = Callable[[StepRecord], None]
OnEval = Callable[[EvalRecord], None]


def train_adapter(
    base_model: Path,
    tokens: Path,
    run_folder: Path,
    config: TrainingConfig,
    *,
    seed: int,
    identity: str,
    on_step: OnStep = lambda record: None,
    on_eval: OnEval = lambda record: None,
) -> TrainingOutcome:
    """Train an adapter, going on from the newest whole checkpoint in the run folder when there is one.

    Seeds the global random states of torch, numpy and Python.

    Args:
        base_model: folder of the base model.
        tokens: folder with train.parquet and eval.parquet (example_id, input_ids, labels).
        run_folder: gets adapter/, checkpoints/ and, where the config asks for it, tensorboard/.
        config: the training section.
        seed: of the adapter's start, the order and the dropout.
        identity: digest of data, config and base model; checkpoints with another one are refused.
        on_step: called after each optimizer step; after a resume, steps since the checkpoint come again.
        on_eval: called after each evaluation.

    Raises:
        TrainingError: the data or the config cannot be trained on, or a loss or gradient is not finite.
        CheckpointError: the run folder holds checkpoints of another run.
    """
    saved = run_folder / "checkpoints"
    checkpoint, warnings = find_checkpoint(saved, identity)
    setup = prepare_training(base_model, tokens, config, seed=seed)
    logger.info("Training with the %s", setup.engine.describe())
    progress = Progress()
    if checkpoint is not None:
        progress = restore_checkpoint(checkpoint, parameters=setup.parameters, optimizer=setup.optimizer)
        logger.info("Resuming from step %d of %d", progress.step, setup.num_steps)
    resumed_from_step = progress.step if checkpoint is not None else None

    def save() -> None:
        save_checkpoint(
            saved,
            parameters=setup.parameters,
            optimizer=setup.optimizer,
            progress=progress,
            identity=identity,
            keep=config.keep_checkpoints,
        )

    with_tensorboard = "tensorboard" in config.report_to
    with (
        open_tensorboard(run_folder / "tensorboard", first_step=progress.step) if with_tensorboard else nullcontext()
    ) as record:
        on_steps: list[OnStep] = [record, on_step] if record else [on_step]
        on_evals: list[OnEval] = [record, on_eval] if record else [on_eval]
        peak_memory_bytes = _run_steps(setup, progress, on_steps, on_evals, save)
    adapter_step = progress.step
    if config.early_stopping_patience is not None and progress.best_step is not None:
        adapter_step = progress.best_step
        write_trained(setup.model, read_trained(name_checkpoint(saved, adapter_step)))
    adapter = save_adapter(setup.model, run_folder / "adapter")
    return TrainingOutcome(
        adapter=adapter,
        num_steps=progress.step,
        final_loss=_average_last_tenth(progress.losses),
        best_eval_loss=min((record.loss for record in progress.evaluations), default=None),
        adapter_step=adapter_step,
        resumed_from_step=resumed_from_step,
        num_examples=len(setup.table.example_ids),
        num_packs=len(setup.rows),
        packing_efficiency=(
            packing_efficiency(setup.table.lengths.tolist(), setup.rows, choose_pack_tokens(setup.table, config))
            if config.packing
            else 1.0
        ),
        num_trained_tokens=progress.num_trained_tokens,
        num_trainable_parameters=sum(p.numel() for p in setup.parameters.values()),
        tokens_per_second=progress.num_tokens / max(progress.train_seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes,
        warnings=(*warnings, *_collect_warnings(setup, progress)),
    )


def _run_steps(
    setup: Setup, progress: Progress, on_steps: list[OnStep], on_evals: list[OnEval], save: Callable[[], None]
) -> int:
    """Do the remaining steps, with evaluations and checkpoints between them; return the peak memory in bytes."""
    config = setup.config
    process = psutil.Process()
    peak_memory_bytes = process.memory_info().rss
    steps = iterate_steps(
        setup.table,
        setup.rows,
        config,
        seed=setup.seed,
        first=progress.step,
        last=setup.num_steps,
        form_step=setup.engine.form_step,
    )
    while progress.step < setup.num_steps and not _should_stop(setup, progress):
        record = _do_step(setup, progress, steps)
        for on_step in on_steps:
            on_step(record)
        is_last = progress.step == setup.num_steps
        is_best = False
        if setup.eval_table is not None and (progress.step % setup.eval_every_steps == 0 or is_last):
            evaluation = _evaluate(setup, progress)
            is_best = evaluation.is_best
            for on_eval in on_evals:
                on_eval(evaluation)
        if progress.step % config.checkpoint_every_steps == 0 or is_last or is_best:
            save()
        peak_memory_bytes = max(peak_memory_bytes, process.memory_info().rss)
    if setup.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(setup.device))
    return peak_memory_bytes


def _do_step(setup: Setup, progress: Progress, steps: Iterator[list[Batch]]) -> StepRecord:
    """Do one optimizer step and count it."""
    started = time.perf_counter()
    batches = next(steps)
    learning_rate = compute_learning_rate(progress.step, setup.num_steps, setup.config)
    loss, grad_norm = descend(setup, batches, learning_rate, step=progress.step + 1)
    seconds = time.perf_counter() - started
    num_tokens = sum(batch.num_tokens for batch in batches)
    num_trained_tokens = sum(batch.num_trained_tokens for batch in batches)
    progress.step += 1
    progress.losses.append(loss)
    progress.num_tokens += num_tokens
    progress.num_trained_tokens += num_trained_tokens
    progress.train_seconds += seconds
    return StepRecord(
        step=progress.step,
        num_steps=setup.num_steps,
        epoch=progress.step / setup.steps_per_epoch,
        loss=loss,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        num_tokens=num_tokens,
        num_trained_tokens=num_trained_tokens,
        tokens_per_second=num_tokens / max(seconds, 1e-9),
    )


def _evaluate(setup: Setup, progress: Progress) -> EvalRecord:
    """Compute the held-out loss and add it to the progress.

    Raises:
        TrainingError: it is not finite.
    """
    assert setup.eval_table is not None
    loss = compute_eval_loss(
        setup.model,
        setup.engine,
        setup.eval_table,
        micro_batch=setup.config.micro_batch,
    )
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
    )
    progress.evaluations.append(record)
    return record


def _should_stop(setup: Setup, progress: Progress) -> bool:
    """Say whether early stopping's patience is over."""
    patience = setup.config.early_stopping_patience
    return patience is not None and count_evals_since_best(progress.evaluations) >= patience


def _average_last_tenth(losses: list[float]) -> float:
    """Return the mean of the last tenth of the steps' losses, of at least one."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _collect_warnings(setup: Setup, progress: Progress) -> list[str]:
    """Return what a person should know about this training."""
    warnings = list(setup.notes)
    overfitting = find_overfitting(progress.evaluations)
    return [*warnings, overfitting] if overfitting else warnings
