"""Prefect's temporary server: started early, and gone with this process however it ends."""

import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psutil
from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from tasks.storage import home

# Ends with either process, so that it leaves nothing behind itself.
_WATCH = (
    "while kill -0 {parent} 2>/dev/null && kill -0 {server} 2>/dev/null; do sleep 1; done; kill {server} 2>/dev/null"
)


# Two that make or bring up to date the same database at once wait for each other in vain.
_TURN_SECONDS = 150.0


class ServerStartError(ValueError):
    """Prefect's temporary server does not start."""


@contextmanager
def starting_server() -> Iterator[None]:
    """Start the temporary server beside what the body does, where no server is configured; be ready at the end.

    Raises:
        ServerStartError: it does not answer in time.

    The server is a process of its own and takes as long to start as the model libraries take to import. Prefect stops
    it at exit; a process that is killed cannot, so a shell watches this one.
    """
    if PREFECT_API_URL.value():
        yield
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        started = pool.submit(_start)
        yield
        started.result()


def _start() -> None:
    # The server inherits this thread's mask: Ctrl-C is for the run, which still has to report how it ended.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = {child.pid for child in psutil.Process().children()}
    logging.disable(logging.INFO)  # it would announce itself, and how to have one that stays
    try:
        with _turn():
            get_client(sync_client=True)  # without a configured server a client starts one, and waits for its answer
    except RuntimeError as error:
        raise ServerStartError(
            f"Prefect's temporary server: {error} On a busy machine give it longer "
            "(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=600), or start one for all runs: sft serve"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    servers = [
        child.pid
        for child in psutil.Process().children()
        if child.pid not in before and any("prefect.server" in word for word in child.cmdline())
    ]
    assert servers, "Prefect's client started no server of its own: has its ephemeral mode changed?"
    command = _WATCH.format(parent=os.getpid(), server=servers[0])
    subprocess.Popen(["/bin/sh", "-c", command], start_new_session=True, stdin=subprocess.DEVNULL)


@contextmanager
def _turn() -> Iterator[None]:
    """Let one run of a home after the other start its server; one that takes too long is not waited for."""
    lock = FileLock(home() / "prefect" / "start.lock")
    with suppress(Timeout, OSError):
        lock.acquire(timeout=_TURN_SECONDS)
    try:
        yield
    finally:
        lock.release()
