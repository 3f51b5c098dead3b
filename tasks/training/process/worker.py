"""The program of a training process: `python -m tasks.training.process.worker JOB.json`, started by the launcher.

For several processes it is first the agent, which starts itself once more for each of them through PyTorch's elastic
launcher; that one sets RANK and WORLD_SIZE. The heavy libraries are imported once the launcher is connected.
"""

import json
import logging
import os
import signal
import sys
import traceback
from dataclasses import asdict
from inspect import signature as read_signature
from pathlib import Path
from typing import Any

from tasks import garbage
from tasks.training.process.connection import LogSender, WorkerConnection, connect_worker
from tasks.training.process.messages import (
    ADDRESS_VARIABLE,
    NODE_RANK_VARIABLE,
    RENDEZVOUS_VARIABLE,
    TrainingJob,
    describe_outcome,
    read_job,
)
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingStopped

_SHUTDOWN_SECONDS = 5
_RENDEZVOUS_SECONDS = 900


def main(path: Path) -> None:
    """Train, or start the processes that do."""
    job = read_job(path)
    is_agent = job.config.num_processes * job.config.num_nodes > 1 and "RANK" not in os.environ
    connection = connect_worker(role="agent" if is_agent else "rank")
    try:
        if is_agent:
            _start_ranks(job, path)
        else:
            _train(job, connection)
    except TrainingStopped:
        connection.send("stopped")
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
        connection.send("error", type=kind, message=text, traceback="".join(traceback.format_exception(error)))
        connection.close()
        raise
    connection.close()


def _train(job: TrainingJob, connection: WorkerConnection) -> None:
    """Train as one of the ranks; tell of it where this is the first one."""
    with garbage.importing():
        from tasks.training.distributed import init_process_group
        from tasks.training.loop import train_adapter

    signal.signal(signal.SIGTERM, lambda number, frame: connection.ask_to_stop())
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO, handlers=[LogSender(connection)] if is_first else None)

    def tell_step(record: StepRecord) -> None:
        connection.send("step", **asdict(record))

    def tell_evaluation(record: EvalRecord) -> None:
        connection.send("eval", **asdict(record))

    with init_process_group():
        outcome = train_adapter(
            job.base_model,
            job.tokens,
            job.run_folder,
            job.config,
            seed=job.seed,
            identity=job.identity,
            on_step=tell_step if is_first else lambda record: None,
            on_eval=tell_evaluation if is_first else lambda record: None,
            should_stop=connection.should_stop,
        )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        connection.send("outcome", **describe_outcome(outcome))


def _start_ranks(job: TrainingJob, path: Path) -> None:
    """Run this machine's processes until all have ended.

    Raises:
        ChildFailedError: one of them failed (and told the launcher why, if it could); the others were stopped.
        TrainingError: it is not said where several machines meet.
    """
    config = job.config
    rendezvous = os.environ.get(RENDEZVOUS_VARIABLE)
    if config.num_nodes > 1 and rendezvous is None:
        raise TrainingError(
            f"training.num_nodes is {config.num_nodes}, but {RENDEZVOUS_VARIABLE} is not set: set it to host:port of "
            f"the first machine on all of them, and {NODE_RANK_VARIABLE} to 0, 1, ..."
        )
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.num_processes)))
    # One machine finds a free port by itself; several meet at an address that is known before.
    place = (
        {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "127.0.0.1"}
        if config.num_nodes == 1
        else {"rdzv_backend": "static", "rdzv_endpoint": rendezvous}
    )
    # PyTorch 2.11 does not know it yet, and waits for half a minute.
    known = "shutdown_timeout" in read_signature(LaunchConfig).parameters
    patience: dict[str, Any] = {"shutdown_timeout": _SHUTDOWN_SECONDS} if known else {}
    launch = LaunchConfig(
        min_nodes=config.num_nodes,
        max_nodes=config.num_nodes,
        nproc_per_node=config.num_processes,
        run_id=job.identity[:32] or "training",
        max_restarts=0,
        rdzv_configs={"rank": int(os.environ.get(NODE_RANK_VARIABLE, "0")), "timeout": _RENDEZVOUS_SECONDS},
        **patience,
        **place,
    )
    elastic_launch(launch, sys.executable)("-m", "tasks.training.process.worker", str(path))


def wait_for_job() -> None:
    """Import what a training needs, and do the job that comes on standard input; where none comes, end.

    See `ahead`.
    """
    with garbage.importing():
        import tasks.training.loop  # noqa: F401

    text = sys.stdin.readline()
    if not text:
        return
    order: dict[str, Any] = json.loads(text)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ.update({**order["environment"], ADDRESS_VARIABLE: order["address"]})
    os.chdir(order["folder"])
    main(Path(order["arguments"][-1]))


if __name__ == "__main__":
    main(Path(sys.argv[1])) if sys.argv[1:] else wait_for_job()
