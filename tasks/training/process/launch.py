"""Runs a training: in a thread of this process on a CPU, else in processes of its own, which it supervises.

A GPU's memory is given back for certain only when the process that took it ends, and a crash in a library must not take
the pipeline along; so a training on a GPU, or on several, gets its own processes. They report over a socket (steps,
evaluations, log lines, a beat every second), hear a stop over it, and end when it breaks. On a CPU with one process
there is nothing to give back, and a second import of the model libraries would take longer than a small training.
"""

import gc
import logging
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from schemas.config import TrainingConfig
from tasks.training.process.ahead import take_waiting
from tasks.training.process.in_place import train_in_place
from tasks.training.process.messages import NODE_RANK_VARIABLE, TrainingJob, write_job
from tasks.training.process.supervise import Listeners, Supervisor
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingOutcome

logger = logging.getLogger(__name__)

STOP_SECONDS = 25.0
"""What a stopped training has to reach its step border and write a checkpoint; Prefect kills after 30."""
SILENCE_SECONDS = 60.0
"""A process that says nothing for so long (it beats every second) is taken for dead."""


def run_training(
    job: TrainingJob,
    *,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    on_eval: Callable[[EvalRecord], None] = lambda record: None,
    on_log: Callable[[int, str], None] = logger.log,
    in_place: bool | None = None,
    stop_seconds: float = STOP_SECONDS,
    silence_seconds: float = SILENCE_SECONDS,
) -> TrainingOutcome:
    """Train an adapter as `train_adapter` does, in this process or in processes of its own.

    An interruption (Ctrl-C, SIGTERM as a cancelled Prefect run gets it) stops the training at the next step border,
    after a checkpoint, and is then raised on; so does an error in a callback where the training has its own process.

    Args:
        job: what to train, and where.
        on_step: called after each optimizer step.
        on_eval: called after each evaluation.
        on_log: gets level and text of log lines from the processes.
        in_place: in this process; None for the choice described above.
        stop_seconds: a training that was asked to stop is killed after so long.
        silence_seconds: a process that does not beat for so long is killed.

    Raises:
        TrainingError: the data or the config cannot be trained on, the config's strategy is not installed, or a loss or
            gradient is not finite.
        CheckpointError: the run folder holds checkpoints of another run.
        TrainingCrash: a process died or fell silent.
        TrainingStopped: somebody stopped the processes from outside.
    """
    _check_strategy(job.config)
    if in_place is None:
        in_place = _belongs_here(job)
    job.run_folder.mkdir(parents=True, exist_ok=True)
    node = int(os.environ.get(NODE_RANK_VARIABLE, "0"))  # several machines may share the folder
    path, log = (
        job.run_folder / (name if node == 0 else f"node-{node}-{name}") for name in ("job.json", "process.log")
    )
    write_job(job, path)  # in place too: whoever opens a checkpoint later reads there what it is of
    if in_place:
        return train_in_place(job, on_step, on_eval)
    _release_gpu()
    with Supervisor(Listeners(on_step, on_eval, on_log), log, silence_seconds=silence_seconds) as supervisor:
        supervisor.start(["-m", "tasks.training.process.worker", str(path)], ahead=take_waiting())
        try:
            return supervisor.wait()
        except BaseException:
            supervisor.stop(stop_seconds)
            raise


def _check_strategy(config: TrainingConfig) -> None:
    """Raise TrainingError where DeepSpeed or torchao is wanted and not installed, before any process loads a model."""
    if config.optimizer == "adamw_8bit":
        from tasks.training.adamw import check_optimizer

        check_optimizer(config)
    is_wanted = config.strategy in ("zero2", "zero3") and config.num_processes * config.num_nodes > 1
    if is_wanted and find_spec("deepspeed") is None:
        raise TrainingError(
            f"training.strategy is {config.strategy}, which needs DeepSpeed: pip install 'sft-pipeline[deepspeed]' on "
            "the machine that trains, or set training.strategy to fsdp"
        )


def _belongs_here(job: TrainingJob) -> bool:
    """Say whether a training may run in this process: one process, and no GPU."""
    import torch

    return job.config.num_processes * job.config.num_nodes == 1 and not torch.cuda.is_available()


def _release_gpu() -> None:
    """Give back the GPU memory that earlier stages left in this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def main(path: Path) -> None:
    """Join a training of several machines from one of them: `python -m tasks.training.process.launch JOB.json`."""
    from tasks.training.process.messages import read_job

    logging.basicConfig(level=logging.INFO)
    outcome = run_training(read_job(path), in_place=False)
    logger.info("Trained %d steps, final loss %.4f", outcome.num_steps, outcome.final_loss)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
