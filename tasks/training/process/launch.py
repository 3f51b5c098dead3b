"""Runs a training: in a thread of this process on a CPU, else in processes of its own, which it supervises.

A GPU's memory is given back for certain only when the process that took it ends, and a crash in a library must not take
the pipeline along; so a training on a GPU, or on several, gets its own processes. They report over a socket (steps,
evaluations, log lines, a beat every second), hear a stop over it, and end when it breaks. On a CPU with one process
there is nothing to give back, and a second import of the model libraries would take longer than a small training.
"""

import gc
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from schemas.config import TrainingConfig
from schemas.plurals import count_of
from tasks.training.place import open_place
from tasks.training.process.ahead import take_waiting
from tasks.training.process.attendance import MOST_FAILURES, MOST_FAILURES_AS_GUEST, Attendance
from tasks.training.process.elastic import read_stop_seconds
from tasks.training.process.in_place import train_in_place
from tasks.training.process.losses import note_loss, read_losses
from tasks.training.process.messages import TrainingJob, write_job
from tasks.training.process.supervise import Listeners, Supervisor
from tasks.training.process.team import leading, meet_again, prepare_job
from tasks.training.records import EvalRecord, StepRecord, TrainingCrash, TrainingError, TrainingOutcome

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 60.0
"""A process that says nothing for so long (it beats every second) is taken for dead."""
_CLOSED = "RendezvousClosedError"
_MOST_LOST = 3
"""In a row, without a step between them: the agent of the machine that leads."""


def run_training(
    job: TrainingJob,
    *,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    on_eval: Callable[[EvalRecord], None] = lambda record: None,
    on_log: Callable[[int, str], None] = logger.log,
    in_place: bool | None = None,
    stop_seconds: float | None = None,
    silence_seconds: float = SILENCE_SECONDS,
) -> TrainingOutcome:
    """Train an adapter as `train_adapter` does, in this process or in processes of its own.

    Losses of processes are among its warnings, also those of earlier attempts of the run.

    An interruption (Ctrl-C, SIGTERM as a cancelled Prefect run gets it) stops the training at the next step border,
    after a checkpoint, and is then raised on; so does an error in a callback where the training has its own process.

    Args:
        job: what to train, and where.
        on_step: called after each optimizer step.
        on_eval: called after each evaluation.
        on_log: gets level and text of the training's log lines.
        in_place: in this process; None for the choice described above.
        stop_seconds: a training that was asked to stop is killed after so long; None: as the environment says, or 25.
        silence_seconds: a process that does not beat for so long is killed.

    Raises:
        TrainingError: the data or the config cannot be trained on, the config's strategy is not installed, or a loss or
            gradient is not finite.
        CheckpointError: the run folder holds checkpoints of another run.
        TrainingCrash: a process died or fell silent.
        TrainingStopped: somebody stopped the processes from outside.
    """
    _check_strategy(job.config)
    if job.leads:
        job = prepare_job(job)
    if in_place is None:
        in_place = _belongs_here(job)
    job.run_folder.mkdir(parents=True, exist_ok=True)
    path = job.run_folder / "job.json"
    write_job(job, path)  # in place too: whoever opens a checkpoint later reads there what it is of
    patience = Patience(read_stop_seconds() if stop_seconds is None else stop_seconds, silence_seconds)
    outcome = (
        train_in_place(job, on_step, on_eval, on_log)
        if in_place
        else _run_processes(job, path, Listeners(on_step, on_eval, on_log), patience)
    )
    return replace(outcome, warnings=(*outcome.warnings, *read_losses(job)))


def _run_processes(job: TrainingJob, path: Path, listeners: Listeners, patience: "Patience") -> TrainingOutcome:
    """Run this machine's processes: alone, of the team that it leads, or as a guest of one."""
    _release_gpu()
    if job.endpoint is None:
        return _keep_training(job, path, listeners, patience)
    if not job.leads:
        return _supervise(job, path, listeners, patience, Attendance(listeners.on_log, MOST_FAILURES_AS_GUEST))
    with leading(job) as offer:
        outcome = _lead(job, path, listeners, patience, offer)
        assert job.place is not None
        from tasks.training.shared_checkpoints import fetch_result  # not at the top: it imports torch

        fetch_result(open_place(job.place), outcome.adapter)
    return outcome


@dataclass(frozen=True)
class Patience:
    """What processes get, in seconds."""

    stop_seconds: float
    silence_seconds: float


def _supervise(
    job: TrainingJob, path: Path, listeners: Listeners, patience: Patience, attendance: Attendance | None
) -> TrainingOutcome:
    """Run this machine's processes to their end."""
    log = job.run_folder / "process.log"
    with Supervisor(listeners, log, silence_seconds=patience.silence_seconds, attendance=attendance) as supervisor:
        supervisor.start(["-m", "tasks.training.process.worker", str(path)], ahead=take_waiting())
        try:
            return supervisor.wait()
        except BaseException:
            supervisor.stop(patience.stop_seconds)
            raise


def _keep_training(job: TrainingJob, path: Path, listeners: Listeners, patience: Patience) -> TrainingOutcome:
    """Run one machine's processes; where they are lost, start them again from their last checkpoint.

    What is lost twice without a new checkpoint in between would be lost for ever: the second loss is raised.
    """
    while True:
        reached = _find_last_checkpoint(job)
        try:
            return _supervise(job, path, listeners, patience, None)
        except TrainingCrash as crash:
            step = _find_last_checkpoint(job)
            if step <= reached:
                note_loss(job, f"The training was lost after the checkpoint of step {step}, which ended an attempt")
                raise
            sentence = f"The training was lost and goes on from the checkpoint of step {step}"
            note_loss(job, sentence)
            listeners.on_log(logging.WARNING, f"{sentence}: {str(crash).partition(chr(10))[0]}")


def _find_last_checkpoint(job: TrainingJob) -> int:
    """Return the step of the last checkpoint; 0 where there is none."""
    names = (path.name.removeprefix("step-") for path in (job.run_folder / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _lead(
    job: TrainingJob, path: Path, listeners: Listeners, patience: Patience, offer: Callable[[TrainingJob], None]
) -> TrainingOutcome:
    """Run this machine's processes of a team; where all of them are lost, they join the others again."""
    attendance = Attendance(listeners.on_log, MOST_FAILURES, on_loss=partial(note_loss, job))
    num_lost, last_step = 0, 0
    while True:
        try:
            return _supervise(job, path, listeners, patience, attendance)
        except TrainingCrash as crash:
            num_lost = num_lost + 1 if attendance.last_step == last_step else 1
            last_step = attendance.last_step
            if num_lost >= _MOST_LOST or attendance.num_failures >= attendance.most_failures:
                raise
            sentence = f"This machine's processes were lost after step {last_step}, and join again"
            note_loss(job, sentence)
            listeners.on_log(logging.WARNING, f"{sentence}: {str(crash).partition(chr(10))[0]}")
            if _CLOSED in str(crash):  # the others have come to an end, or one of them has given up for all
                job = meet_again(job)
                write_job(job, path)
                offer(job)


def check_machine(config: TrainingConfig) -> None:
    """Refuse a training that this machine cannot do, before a stage has worked for it.

    Raises:
        TrainingError: the config's weights cannot be had here, or the config's strategy is not installed.
    """
    from tasks.models import choose_device
    from tasks.training.frozen import find_hindrance

    _check_strategy(config)
    if hindrance := find_hindrance(config, choose_device()):
        raise TrainingError(hindrance)


def _check_strategy(config: TrainingConfig) -> None:
    """Raise TrainingError where DeepSpeed or torchao is wanted and not installed, before any process loads a model."""
    if config.optimizer == "adamw_8bit":
        from tasks.training.adamw import check_optimizer

        check_optimizer(config)
    is_wanted = config.strategy in ("zero2", "zero3") and config.num_ranks > 1
    if is_wanted and find_spec("deepspeed") is None:
        raise TrainingError(
            f"training.strategy is {config.strategy}, which needs DeepSpeed: pip install 'sft-pipeline[deepspeed]' on "
            "the machine that trains, or set training.strategy to fsdp"
        )


def settle_processes(config: TrainingConfig) -> TrainingConfig:
    """Return the config with a number of processes: where it says auto, one for each GPU of this machine.

    They are no more than a step has rows for, over all machines.
    """
    if config.num_processes != "auto":
        return config
    number = max(1, min(count_gpus(), config.rows_per_step // config.num_nodes))
    return config.model_copy(update={"num_processes": number})


def describe_idle(config: TrainingConfig) -> str | None:
    """Say which GPUs of this machine will not train, and how they would; None where there are none."""
    idle = count_gpus() - config.num_own_processes
    sharing = config.context_parallel
    if idle < sharing or config.num_ranks // sharing >= config.rows_per_step:
        return None
    told = f"{count_of(idle, 'GPU of this machine is', 'GPUs of this machine are')} not used by this training"
    if sharing > 1:
        return f"{told}: training.num_processes may be {count_gpus() // sharing * sharing}"
    return f"{told}: training.num_processes auto takes all of them"


def count_gpus() -> int:
    """Return how many GPUs this process sees."""
    import torch

    return torch.cuda.device_count()


def _belongs_here(job: TrainingJob) -> bool:
    """Say whether a training may run in this process: one process, and no GPU."""
    import torch

    return job.config.num_ranks == 1 and not torch.cuda.is_available()


def _release_gpu() -> None:
    """Give back the GPU memory that earlier stages left in this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
