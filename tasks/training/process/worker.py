"""The program of a training process: `python -m tasks.training.process.worker JOB.json`, started by the launcher.

For several processes it is first the agent, which starts itself once more for each of them through PyTorch's elastic
launcher (see `elastic`); that one sets RANK and WORLD_SIZE, as torchrun does. The heavy libraries are imported once the
launcher is connected.
"""

import json
import logging
import os
import signal
import socket
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks import garbage
from tasks.lean_imports import shorten_imports
from tasks.training.process.connection import LogSender, WorkerConnection, connect_worker
from tasks.training.process.elastic import start_ranks
from tasks.training.process.messages import (
    ADDRESS_VARIABLE,
    TrainingJob,
    describe_outcome,
    read_job,
)
from tasks.training.records import EvalRecord, StepRecord, TrainingStopped

_GO_ON_CODE = 75
"""Exit code of a process that stopped because another one had to: its agent starts it again."""


def main(path: Path) -> None:
    """Train, or start the processes that do."""
    job = read_job(path)
    is_agent = job.config.num_ranks > 1 and "RANK" not in os.environ
    connection = connect_worker(role="agent" if is_agent else "rank")
    goes_on = False
    try:
        if is_agent:
            start_ranks(job, path)
        else:
            _train(job, connection)
    except TrainingStopped:
        connection.send("stopped")
        goes_on = job.endpoint is not None and not connection.was_asked_to_stop()
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
        connection.send("error", type=kind, message=text, traceback="".join(traceback.format_exception(error)))
        connection.close()
        raise
    connection.close()
    if goes_on:
        sys.exit(_GO_ON_CODE)


def _train(job: TrainingJob, connection: WorkerConnection) -> None:
    """Train as one of the ranks; tell of it where this is the machine's first one: all have the same losses."""
    with garbage.importing():
        from tasks.training.distributed import gather, init_process_group, world_size
        from tasks.training.loop import train_adapter
        from tasks.training.place import open_place

    signal.signal(signal.SIGTERM, lambda number, frame: connection.ask_to_stop())
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO, handlers=[LogSender(connection)] if is_first else None)

    def tell_step(record: StepRecord) -> None:
        connection.send("step", **asdict(record))

    def tell_evaluation(record: EvalRecord) -> None:
        connection.send("eval", **asdict(record))

    with init_process_group():
        if job.endpoint is not None:
            machines = [name for name, is_one in gather((socket.gethostname(), is_first)) if is_one]
            if is_first:
                connection.send("team", machines=machines, num_processes=world_size())
        outcome = train_adapter(
            job.base_model,
            job.tokens,
            job.run_folder,
            job.config,
            seed=job.seed,
            identity=job.identity,
            place=None if job.place is None else open_place(job.place),
            tokens_address=job.tokens_address,
            tells=is_first and job.leads,
            on_step=tell_step if is_first else lambda record: None,
            on_eval=tell_evaluation if is_first else lambda record: None,
            should_stop=connection.should_stop,
        )
    if is_first:
        connection.send("outcome", **describe_outcome(outcome))


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
    shorten_imports()
    main(Path(sys.argv[1])) if sys.argv[1:] else wait_for_job()
