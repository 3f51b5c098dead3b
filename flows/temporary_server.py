"""Prefect's temporary server: started early, and gone with this process however it ends.

It is a process of its own (`flows.service.temporary`), which ends when the pipe from this one breaks. Its socket is
made here and handed over, so that its address is known and no other program's before it has imported anything.
"""

import atexit
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
from filelock import FileLock, Timeout
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

from tasks.storage import home

_PROGRAM = "flows.service.temporary"
# Two that make or bring up to date the same database at once wait for each other in vain.
_TURN_SECONDS = 150.0
_ASK_SECONDS = 0.1
_END_SECONDS = 5.0


class ServerStartError(ValueError):
    """Prefect's temporary server does not start."""


@contextmanager
def starting_server() -> Iterator[None]:
    """Start the temporary server beside what the body does, where no server is configured; be ready at the end.

    Raises:
        ServerStartError: it ends, or does not answer in time.

    It takes as long to start as the model libraries take to import. It is stopped at exit; a process that is killed
    cannot do that, so the server watches this one.
    """
    if PREFECT_API_URL.value():
        yield
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        started = pool.submit(_start)
        yield
        _use(started.result())


def _use(url: str) -> None:
    """Let this process's clients speak to the server. What it starts has servers of its own, or needs none."""
    given = {"PREFECT_API_URL": url, "PREFECT_UI_URL": ""}  # it has no pages
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    refresh_global_settings_context()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _start() -> str:
    """Start the server, wait until it answers, and return the address of its API."""
    with _turn(), socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", _PROGRAM, str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for the run, which still has to report how it ended
        )
        atexit.register(_stop, server)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        _wait(server, url)
        return url


def _wait(server: "subprocess.Popen[bytes]", url: str) -> None:
    limit = float(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
    end = time.monotonic() + limit
    while server.poll() is None and (left := end - time.monotonic()) > 0:
        # The socket takes connections from the first moment on; the answer comes when the server is ready.
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=min(left, 5.0)).is_success:
                return
        time.sleep(_ASK_SECONDS)
    code = server.poll()
    said = f"Timed out after {limit:.0f} s." if code is None else f"It ended with exit code {code}."
    _stop(server)
    raise ServerStartError(
        f"Prefect's temporary server: {said} On a busy machine give it longer "
        "(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=600), or start one for all runs: sft serve"
    )


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if server.stdin is not None:
        server.stdin.close()


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
