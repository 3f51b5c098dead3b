"""Supervised fine-tuning of an adapter, or of the model's own weights: the loop that the pipeline runs.

    loss of a step = sum of -log p(token) over its trained tokens / number of those tokens

over all micro batches of the step together, so that accumulation, padding, packing and a short last step change nothing
about what is optimized. `reference.py` is the same training in the plainest form; tests hold the two together.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from schemas.config import TrainingConfig
from tasks.out_of_memory import is_out_of_memory
from tasks.speeds import name_device
from tasks.training.adapter_costs import describe_costs
from tasks.training.checkpoints import (
    CheckpointError,
    Progress,
    find_checkpoint,
    name_checkpoint,
    read_trained,
    restore_checkpoint,
)
from tasks.training.curves import open_tensorboard
from tasks.training.distributed import any_rank, gather, is_rank0, machine, run_on_rank0, world_size
from tasks.training.engines.choice import fit_general
from tasks.training.engines.general import GeneralEngine
from tasks.training.memory import read_memory
from tasks.training.methods import describe_trained, name_trained_folder, save_trained
from tasks.training.movement import find_unmoved, take_fingerprints
from tasks.training.objective import Objective
from tasks.training.packing import packing_efficiency
from tasks.training.place import Place
from tasks.training.preferences import find_reference
from tasks.training.preparation import Setup, prepare_training
from tasks.training.random_states import seed_per_rank
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingOutcome, TrainingStopped
from tasks.training.rows import choose_pack_tokens
from tasks.training.sharded_optimizer import hand_over
from tasks.training.sharding import is_sharded, is_zero, shard_base, shard_weights
from tasks.training.shared_checkpoints import bring_checkpoints, share_result
from tasks.training.steps import Run, do_step, evaluate, iterate, save
from tasks.training.sweep import train_sweep
from tasks.training.throughput import measure_peak
from tasks.training.token_parts import describe_parts, reading_parts
from tasks.training.validation import count_evals_since_best, find_overfitting
from tasks.training.writing import CheckpointWriter

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
    objective: Objective | None = None,
    place: Place | None = None,
    tokens_address: str | None = None,
    tells: bool | None = None,
    on_step: OnStep = lambda record: None,
    on_eval: OnEval = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingOutcome:
    """Train an adapter, going on from the newest whole checkpoint in the run folder when there is one.

    Seeds the global random states of torch, numpy and Python. Where several ranks have joined (see `distributed`), each
    of them calls this with the same arguments; the first one writes.

    Args:
        base_model: folder of the base model.
        tokens: folder with train.parquet and eval.parquet (example_id, input_ids, labels).
        run_folder: gets adapter/ or trained_weights/, checkpoints/ and, where the config asks for it, tensorboard/.
        config: the training section.
        seed: of the adapter's start, the order and the dropout.
        identity: digest of data, config and base model; checkpoints with another one are refused.
        objective: what a step optimizes; None: as the config says.
        place: that machines share, each with a run folder of its own: for the checkpoints, and what was trained.
        tokens_address: of the tokens' folder in a store, where this one lacks parts of a large train.parquet.
        tells: whether this rank writes curves for people; None: the first one does.
        on_step: called after each optimizer step; after a resume, steps since the checkpoint come again.
        on_eval: called after each evaluation.
        should_stop: asked before each step, and on several ranks heeded when one says so.

    Raises:
        TrainingError: the data or the config cannot be trained on, or a loss or gradient is not finite.
        CheckpointError: the run folder holds checkpoints of another run, or one cannot be written.
        TrainingStopped: `should_stop` said so; a checkpoint was written.
    """
    if config.sweep.is_on:
        return train_sweep(
            base_model, tokens, run_folder, config, seed=seed, identity=identity, train=train_adapter,
            on_step=on_step, on_eval=on_eval, should_stop=should_stop, place=place, tokens_address=tokens_address,
        )  # fmt: skip
    saved = run_folder / "checkpoints"
    passed_over = bring_checkpoints(place, saved, with_best=config.keeps_best) if place is not None else []
    found, warnings = run_on_rank0(lambda: find_checkpoint(saved, identity, with_best=config.keeps_best))
    checkpoint = None if found is None else saved / found.name
    with _naming_shortage(base_model, config):
        examples = run_folder / f"examples-{machine()}"
        setup = prepare_training(
            base_model, tokens, examples, config, seed=seed, objective=objective, tokens_address=tokens_address
        )
    _tell(setup)
    with reading_parts(setup.table.parts):
        run = Run(setup, Progress(), identity, [*passed_over, *warnings], peak_memory_bytes=read_memory(setup.device))
        _begin(run, checkpoint, base_model, run_folder, place)
        resumed_from_step = run.progress.step if checkpoint is not None else None
        tells = is_rank0() if tells is None else tells
        with (
            CheckpointWriter(saved, keep=config.keep_checkpoints, place=place) as writer,
            _recording(run, run_folder, on_step, on_eval, tells=tells) as (on_steps, on_evals),
        ):
            _run_steps(run, on_steps, on_evals, writer, should_stop)
        _tell_parts(setup)
        adapter_step, unmoved = _save_chosen(run, run_folder, place)
        run.warnings += unmoved
        return _describe(
            run, name_trained_folder(run_folder, config), adapter_step=adapter_step, resumed_from_step=resumed_from_step
        )


def _begin(run: Run, checkpoint: Path | None, base_model: Path, run_folder: Path, place: Place | None) -> None:
    """Seed this rank, take up a checkpoint, and divide the training among the ranks."""
    setup, config = run.setup, run.setup.config
    run.tokens_per_second_at_peak = _estimate_peak(setup)
    seed_per_rank(setup.seed, 0)
    if checkpoint is not None:
        _restore(run, checkpoint)
    with _naming_shortage(base_model, config):
        run.setup = _divide(setup)
        if config.is_paired:
            has_begun = checkpoint is not None
            run.setup = _with_reference(run.setup, run_folder, run.identity, place, has_begun=has_begun)


@contextmanager
def _recording(
    run: Run, run_folder: Path, on_step: OnStep, on_eval: OnEval, *, tells: bool
) -> Iterator[tuple[list[OnStep], list[OnEval]]]:
    """Give whom to call after each step and each evaluation; with TensorBoard's files where the config wants them."""
    if not tells or "tensorboard" not in run.setup.config.report_to:
        yield [on_step], [on_eval]
        return
    with open_tensorboard(run_folder / "tensorboard", first_step=run.progress.step) as record:
        yield [record, on_step], [record, on_eval]


def _tell(setup: Setup) -> None:
    """Say with what is trained, and what of it is slow; the warnings at the end have it too, an hour later."""
    config, engine = setup.config, setup.engine.describe()
    logger.info("Training with the %s", engine)
    costs = describe_costs(config, setup.parameters, engine, setup.dtype)
    for sentence in (*setup.notes, *costs, *describe_trained(setup.adapted, config)):
        logger.info(sentence)


def _tell_parts(setup: Setup) -> None:
    """Say what of a large table was read and fetched."""
    parts = setup.table.parts
    if parts is not None:
        logger.info(describe_parts(gather(parts.counts), len(parts)))


def _with_reference(setup: Setup, run_folder: Path, identity: str, place: Place | None, *, has_begun: bool) -> Setup:
    """Return the training with what the model that it begins with makes of its pairs."""
    tables = {"train": setup.table} | ({} if setup.eval_table is None else {"eval": setup.eval_table})
    found = find_reference(
        run_folder, identity, tables, setup.model, setup.engine, setup.config, has_begun=has_begun, place=place
    )
    return replace(setup, table=found["train"], eval_table=found.get("eval"))


def _restore(run: Run, checkpoint: Path) -> None:
    """Put a checkpoint's state into a training that no rank holds only a part of yet."""
    parameters, optimizer = run.setup.optimizer.unsharded()
    run.progress = restore_checkpoint(checkpoint, parameters=parameters, optimizer=optimizer)
    run.saved_step = run.progress.step
    run.warnings[:0] = [earlier for earlier in run.progress.warnings if earlier not in run.warnings]
    logger.info("Resuming from step %d of %d", run.progress.step, run.setup.num_steps)


def _save_chosen(run: Run, run_folder: Path, place: Place | None) -> tuple[int, list[str]]:
    """Save the best adapter or the last one, as `training.keep` says; return its step, and what has not moved."""
    setup, progress = run.setup, run.progress
    step = progress.step
    last: Mapping[str, Tensor] = setup.optimizer.unsharded()[0]  # whole on the first rank, which saves it
    if setup.config.keeps_best and progress.best_step not in (None, step):
        step = int(progress.best_step or step)
        logger.info("What was trained up to step %d is kept, whose evaluation loss is the smallest", step)

    def save_trained_weights() -> list[str]:
        trained = last if step == progress.step else read_trained(name_checkpoint(run_folder / "checkpoints", step))
        folder = name_trained_folder(run_folder, setup.config)
        save_trained(setup.model, setup.config, folder, trained)
        if place is not None:
            share_result(place, folder)
        return find_unmoved(setup.start, take_fingerprints(setup.model, trained), num_steps=step)

    return step, run_on_rank0(save_trained_weights)


def _describe(run: Run, adapter: Path, *, adapter_step: int, resumed_from_step: int | None) -> TrainingOutcome:
    """Return what came out of the training."""
    setup, progress = run.setup, run.progress
    piece_tokens, num_in_host = setup.engine.long_ways
    efficiency = 1.0
    if setup.config.packing:
        tokens_per_pack = choose_pack_tokens(setup.table.lengths, setup.config)
        efficiency = packing_efficiency([int(setup.table.lengths.sum())], setup.rows, tokens_per_pack)
    return TrainingOutcome(
        adapter=adapter,
        num_steps=progress.step,
        final_loss=_average_last_tenth(progress.losses),
        best_eval_loss=min((record.loss for record in progress.evaluations), default=None),
        adapter_step=adapter_step,
        resumed_from_step=resumed_from_step,
        num_examples=len(setup.table.group_lengths),
        num_packs=len(setup.rows),
        packing_efficiency=efficiency,
        num_trained_tokens=progress.num_trained_tokens,
        num_trainable_parameters=setup.num_trainable_parameters,
        tokens_per_second=progress.num_tokens / max(progress.train_seconds, 1e-9),
        peak_memory_bytes=max(gather(run.peak_memory_bytes)),
        adapted=setup.adapted,
        warnings=(*run.warnings, *_collect_warnings(setup, progress)),
        engine=setup.engine.describe(),
        device=name_device(),
        flop_per_token=setup.flop_per_token,
        recomputed_part=setup.engine.recomputed_part,
        is_flat=setup.engine.is_flat,
        room_tokens=setup.engine.room_tokens,
        piece_tokens=piece_tokens,
        num_in_host=num_in_host,
    )


def _divide(setup: Setup) -> Setup:
    """Divide the training among the ranks where the config says so."""
    if is_zero(setup.config):
        from tasks.training.zero import divide

        return divide(setup)
    if is_sharded(setup.config):
        general = setup.engine
        if not isinstance(general, GeneralEngine):
            return setup  # the fused engine divides a model while it is read
        if setup.config.is_lora:
            shard_base(setup.model, setup.device)
        else:
            held = dict(setup.parameters)
            shard_weights(setup.model, setup.device, setup.dtype)
            setup = hand_over(setup, held)
        engine = fit_general(general, setup.table, setup.config, list(setup.parameters.values()))
        return replace(setup, engine=engine)
    return setup


@contextmanager
def _naming_shortage(base_model: Path, config: TrainingConfig) -> Iterator[None]:
    """Say what to do where the model does not fit into the memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what, how = ("its adapter", "lower training.rank") if config.is_lora else ("its optimizer", "train with LoRA")
        raise TrainingError(
            f"{base_model}: the base model and {what} do not fit into the memory ({error}): {how}, or set "
            "training.strategy to fsdp on several GPUs"
        ) from error


def _estimate_peak(setup: Setup) -> float | None:
    """Return the tokens a second of all ranks if a GPU did nothing but useful matrix products; None on a CPU."""
    peak = measure_peak(setup.device) if setup.device.type == "cuda" else None
    return None if peak is None else world_size() * peak / setup.flop_per_token


def _run_steps(
    run: Run,
    on_steps: list[OnStep],
    on_evals: list[OnEval],
    writer: CheckpointWriter,
    should_stop: Callable[[], bool],
) -> None:
    """Do the remaining steps, with evaluations and checkpoints between them.

    Raises:
        TrainingStopped: `should_stop` said so; a checkpoint was written.
    """
    setup, progress = run.setup, run.progress
    steps = iterate(run)
    while progress.step < setup.num_steps and not _is_patience_over(setup, progress):
        if any_rank(should_stop()):
            if run.saved_step != progress.step:
                save(run, writer)
            run_on_rank0(writer.finish)  # whoever goes on, goes on from there
            logger.info("Stopped after step %d of %d, with a checkpoint of it", progress.step, setup.num_steps)
            raise TrainingStopped(f"stopped after step {progress.step} of {setup.num_steps}")
        writer.check()
        record, steps = do_step(run, steps)
        for on_step in on_steps:
            on_step(record)
        is_last = progress.step == setup.num_steps
        is_kept = False
        if setup.eval_table is not None and (progress.step % setup.eval_every_steps == 0 or is_last):
            evaluation = evaluate(run)
            is_kept = evaluation.is_best and setup.config.keeps_best
            for on_eval in on_evals:
                on_eval(evaluation)
        if progress.step % setup.config.checkpoint_every_steps == 0 or is_last or is_kept:
            save(run, writer)


def _is_patience_over(setup: Setup, progress: Progress) -> bool:
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
