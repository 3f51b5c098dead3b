"""The door of training: examples and a base model become an adapter."""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import UUID

import polars as pl
from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from schemas.artifacts import AdaptedWeights, AdapterRef, ModelRef, TokensRef
from schemas.config import SETTINGS_OF_PLACE, TrainingConfig
from tasks import storage, tracking
from tasks.training.candidates import name_candidates
from tasks.training.cards import complete_folder
from tasks.training.order import is_windowed
from tasks.training.pace import PaceClock, count_tokens
from tasks.training.process.launch import describe_idle, run_training, settle_processes
from tasks.training.process.messages import TrainingJob
from tasks.training.process.team import clear_training
from tasks.training.records import EvalRecord, StepRecord, TrainingOutcome

_SHOW_SECONDS = 2.0
MetricLog = Callable[[int, Mapping[str, float]], None]


@task(
    name="train",
    task_run_name="train {base_model.name}",
    cache_policy=NO_CACHE,
    persist_result=True,
    result_serializer="json",
)
def train(
    base_model: ModelRef, tokens: TokensRef, config: TrainingConfig, *, seed: int, parent_run_id: str
) -> AdapterRef:
    """Train an adapter or the model's own weights, going on from the last checkpoint of an interrupted attempt."""
    if (done := tracking.recall(parent_run_id, "train", AdapterRef)) is not None:
        return done
    logger, config = get_run_logger(), settle_processes(config)
    if told := describe_idle(config):
        logger.warning(told)
    folder = storage.run_folder(parent_run_id) / "train"
    with (
        tracking.stage_run(parent_run_id, "train", config, system_metrics=True) as run_id,
        tracking.metric_log(run_id) as log,
        _progress_bar() as progress,
    ):
        tokens_folder, tokens_address = _find_tokens(tokens)
        job = TrainingJob(
            base_model=tracking.resolve(base_model),
            tokens=tokens_folder,
            tokens_address=tokens_address,
            run_folder=folder,
            config=config,
            seed=seed,
            identity=_identity(base_model, tokens, config, seed),
        )
        with _candidate_logs(run_id, config, seed) as candidates:
            pace = PaceClock(
                _step_reporter(log, candidates, progress),
                _eval_reporter(log, candidates, progress),
                saves_every=config.checkpoint_every_steps,
            )
            outcome = run_training(job, on_step=pace.count, on_eval=pace.judge, on_log=_line_reporter(progress))
        pace.note(outcome, job, num_held_out=count_tokens(job.tokens / "eval.parquet"))
        if outcome.resumed_from_step is not None:
            logger.info("Went on from the checkpoint of step %d", outcome.resumed_from_step)
        for warning in outcome.warnings:
            logger.warning(warning)
        tracking.log_table(run_id, _tabulate(outcome.adapted), "adapted_weights.json")
        if (folder / "tensorboard").is_dir():
            tracking.log_folder(run_id, folder / "tensorboard", "tensorboard")
        trained = config if outcome.sweep is None else name_candidates(config, seed)[outcome.sweep.winner]
        complete_folder(outcome.adapter, job.tokens / "tokenizer", base_model, trained)
        ref = _publish(outcome, run_id, config)
        tracking.remember(run_id, ref)
        clear_training(job)
    speed = f"{ref.tokens_per_second:,.0f}"
    logger.info("Trained %d steps at %s tokens/s, final loss %.4f", ref.num_steps, speed, ref.final_loss)
    return ref


def _find_tokens(tokens: TokensRef) -> tuple[Path, str | None]:
    """Return the tokens' folder, and the address of parts that it lacks: of a large table each rank fetches its own."""
    folder = tracking.resolve_some(tokens, "eval.parquet")
    if is_windowed(folder) and (address := tracking.find_address(tokens)) is not None:
        return folder, address
    return tracking.resolve(tokens), None


def _tabulate(adapted: Sequence[AdaptedWeights]) -> pl.DataFrame:
    """Return which weights the adapter stands beside, a row for each kind."""
    rows = [{**row.model_dump(exclude={"skipped"}), "not_adapted": "; ".join(row.skipped)} for row in adapted]
    return pl.DataFrame(rows)


def _publish(outcome: TrainingOutcome, run_id: str, config: TrainingConfig) -> AdapterRef:
    uri, digest = tracking.publish(outcome.adapter, run_id, outcome.adapter.name)
    return AdapterRef(
        uri=uri,
        digest=digest,
        mlflow_run_id=run_id,
        method=config.method,
        num_steps=outcome.num_steps,
        num_packs=outcome.num_packs,
        packing_efficiency=outcome.packing_efficiency,
        final_loss=outcome.final_loss,
        best_eval_loss=outcome.best_eval_loss,
        tokens_per_second=outcome.tokens_per_second,
        peak_memory_bytes=outcome.peak_memory_bytes,
        adapted=outcome.adapted,
        warnings=tuple(outcome.warnings),
        sweep=outcome.sweep,
    )


@contextmanager
def _candidate_logs(run_id: str, config: TrainingConfig, seed: int) -> Iterator[dict[str, MetricLog]]:
    """Open a child run for each candidate of a sweep, and give the functions that log their curves."""
    with ExitStack() as stack:
        logs: dict[str, MetricLog] = {}
        for name, settings in name_candidates(config, seed).items() if config.sweep.is_on else ():
            child = stack.enter_context(tracking.stage_run(run_id, name, settings))
            logs[name] = stack.enter_context(tracking.metric_log(child))
        yield logs


def _log_figures(
    log: MetricLog, candidates: Mapping[str, MetricLog], step: int, part: str, figures: Mapping[str, float]
) -> None:
    """Send figures to the run, and those of a candidate, which begin with its name, to its own."""
    for name, value in figures.items():
        owner, _, curve = name.rpartition("/")
        if owner:
            candidates[owner](step, {f"{part}/{curve}": value})
        else:
            log(step, {f"{part}/{curve}": value})


def _step_reporter(
    log: MetricLog, candidates: Mapping[str, MetricLog], progress: Progress
) -> Callable[[StepRecord], None]:
    """Return a function that sends a step's curves to MLflow and its progress to terminal and Prefect."""
    show = _progress_shower(progress)

    def report(record: StepRecord) -> None:
        curves = {
            "train/loss": record.loss,
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": record.grad_norm,
            "train/tokens_per_second": record.tokens_per_second,
            "train/epoch": record.epoch,
            "train/memory_bytes": record.memory_bytes,
        }
        _log_figures(log, candidates, record.step, "train", record.figures)
        if record.utilisation is not None:
            curves["train/gpu_utilisation"] = record.utilisation
        if record.share_of_peak is not None:
            curves["train/share_of_peak"] = record.share_of_peak
        log(record.step, curves)
        show(record)

    return report


def _eval_reporter(
    log: MetricLog, candidates: Mapping[str, MetricLog], progress: Progress
) -> Callable[[EvalRecord], None]:
    """Return a function that sends an evaluation loss to MLflow and the log."""
    write = _line_reporter(progress)

    def report(record: EvalRecord) -> None:
        log(record.step, {"eval/loss": record.loss})
        _log_figures(log, candidates, record.step, "eval", record.figures)
        own = {name: each for name, each in record.figures.items() if "/" not in name}
        told = "".join(f", {name.replace('_', ' ')} {each:.3g}" for name, each in own.items())
        told += f", the smallest of {len(record.figures)}" if len(record.figures) > len(own) + 1 else ""
        write(logging.INFO, f"Step {record.step}: evaluation loss {record.loss:.4f}{told}")

    return report


def _line_reporter(progress: Progress) -> Callable[[int, str], None]:
    """Return a function that writes a line of a level to the run's log."""
    logger = get_run_logger()

    def report(level: int, message: str) -> None:
        progress.stop()  # the log line would be written into the bar
        logger.log(level, message)
        progress.start()

    return report


def _identity(base_model: ModelRef, tokens: TokensRef, config: TrainingConfig, seed: int) -> str:
    """Return a digest of all that decides the adapter; a checkpoint of another identity is refused.

    Where it is computed is no part of it: a run may go on with another number of processes.
    """
    settings = config.model_dump(mode="json", exclude=set(SETTINGS_OF_PLACE))
    parts = [base_model.digest, tokens.digest, settings, seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("  training"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        transient=True,
        disable=not sys.stdout.isatty(),  # elsewhere each start and stop leaves an empty line; a notebook breaks on it
    )


def _progress_shower(progress: Progress) -> Callable[[StepRecord], None]:
    """Return a function that shows a step in the terminal, and every two seconds in the Prefect UI."""
    artifact_id = create_progress_artifact(progress=0.0, key="training-progress", description="Training progress")
    assert isinstance(artifact_id, UUID)  # a coroutine only where the caller is one
    bar = progress.add_task("training", total=None, loss=0.0, speed=0.0)
    shown = time.monotonic()

    def show(record: StepRecord) -> None:
        nonlocal shown
        progress.update(
            bar, completed=record.step, total=record.num_steps, loss=record.loss, speed=record.tokens_per_second
        )
        if time.monotonic() - shown > _SHOW_SECONDS or record.step == record.num_steps:
            update_progress_artifact(artifact_id=artifact_id, progress=100.0 * record.step / record.num_steps)
            shown = time.monotonic()

    return show
