"""Two ranks on this machine, each a process of its own, forked from one that has imported the libraries once."""

import atexit
import gc
import importlib
import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_SECONDS = 120
_Job = tuple[Callable[..., Any], tuple[Any, ...], int, Path]


def on_two_ranks(work: Callable[..., Any], *arguments: Any, folder: Path, library: str | None = None) -> list[Any]:
    """Do something on two ranks; return what each of them returned or raised.

    A library that the work imports late is named, so that not every rank takes seconds to import it anew.
    """
    folder.mkdir()
    parent = _parent()
    parent.send((library, (work, arguments, find_port(), folder)))
    assert parent.recv() == "done"
    return [pickle.loads((folder / f"rank-{number}").read_bytes()) for number in range(2)]


def find_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@cache
def _parent() -> Connection:
    """Start the process that ranks are forked from, and return the line to it."""
    here, there = multiprocessing.Pipe()
    # Not the fork server: there is one for all, and that of the data's workers has no torch.
    process = multiprocessing.get_context("spawn").Process(target=_raise_ranks, args=(there,), name="ranks' parent")
    process.start()
    there.close()

    def end() -> None:
        here.close()
        process.join(timeout=10)

    atexit.register(end)
    return here


def _raise_ranks(line: Connection) -> None:
    """Fork two ranks for each job that comes, until the line is closed; the work itself would leave its traces here."""
    torch.set_num_threads(1)  # threads are not forked along
    context = multiprocessing.get_context("fork")
    while True:
        try:
            job: _Job
            library, job = line.recv()  # unpickled: imports the module that the work is from
        except EOFError:
            return
        if library is not None:
            importlib.import_module(library)
        gc.freeze()  # else each rank goes through what was imported, and gets copies of its pages
        ranks = [context.Process(target=_live, args=(*job, number)) for number in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=_SECONDS)
            process.kill()
        line.send("done")


def _live(work: Callable[..., Any], arguments: tuple[Any, ...], port: int, folder: Path, number: int) -> None:
    """Be one of two ranks."""
    from tasks.training.distributed import init_process_group

    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    try:
        with init_process_group():
            result = work(number, *arguments)
    except Exception as error:
        result = error
    (folder / f"rank-{number}").write_bytes(pickle.dumps(result))
