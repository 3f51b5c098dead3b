"""A run asks the server for its own state, and ends itself when the server has ended it and no worker stops it.

A worker stops the process of a run that is cancelled. It may be gone, though, or have lost its line to the server for
good in an outage; the process would then keep its GPU although the server has given its place away.
"""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import Abort, ObjectNotFound, TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

_ASK_SECONDS = 5.0
_WORKER_SECONDS = 40.0  # what a worker has to stop a cancelled run: after 30 it kills


@contextmanager
def cancel_with_server() -> Iterator[None]:
    """Interrupt the body when the server has ended this run, or cancels it and no worker does it.

    A run that was cancelled is then marked so.

    Raises:
        Abort: for Prefect, which then leaves the run's state as it is.
    """
    if deployment.id is None:  # no deployment started it: there is no worker, and the terminal has Ctrl-C
        yield
        return
    watch = _Watch(UUID(str(flow_run.id)))
    try:
        with watch.running():
            yield
    except TerminationSignal:
        if watch.state is None:
            raise
        get_run_logger().warning("Ended because the server's state of this run is %s", watch.state.name)
        if watch.state.is_cancelling():
            with get_client(sync_client=True) as client:
                message = "Cancelled. No worker was there to do it: the run ended by itself."
                client.set_flow_run_state(watch.run_id, Cancelled(message=message), force=True)
        raise Abort(f"the server's state of this run is {watch.state.name}") from None
    finally:
        gc.freeze()  # the process ends now: going through all that the libraries made would take seconds more


class _Watch:
    """Asks the server for a run's state beside the work."""

    def __init__(self, run_id: UUID) -> None:
        self.run_id = run_id
        self.state: State | None = None
        """Why the work was interrupted, if it was."""
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                self._is_over.set()

    def _watch(self) -> None:
        cancelling_since: float | None = None
        with get_client(sync_client=True) as client:
            while not self._is_over.wait(_ASK_SECONDS):
                try:
                    state = client.read_flow_run(self.run_id).state
                except ObjectNotFound:
                    state = State(type=StateType.CANCELLED, name="deleted")
                except httpx.HTTPError:
                    continue
                if state is None or not (state.is_cancelling() or state.is_final()):
                    cancelling_since = None
                    continue
                cancelling_since = cancelling_since or time.monotonic()
                if state.is_final() or time.monotonic() - cancelling_since > _WORKER_SECONDS:
                    self._interrupt(state)
                    return

    def _interrupt(self, state: State) -> None:
        with self._lock:
            if not self._is_over.is_set():
                self.state = state
                os.kill(os.getpid(), signal.SIGTERM)  # Prefect's handler raises TerminationSignal in the main thread
