"""A run whose outcome is known ends with exit code 0, whatever signal comes and whatever is lost then.

A scheduler starts a job again that ended by a signal. Between the moment at which MLflow has a run as finished and the
end of its process lie seconds, in which Prefect is told and tables are printed: a job killed there would be trained
once more.
"""

import os
import signal
import threading
from dataclasses import dataclass
from types import FrameType

from prefect.runtime import deployment

from schemas.artifacts import RunReport

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""By which terminals and schedulers end a process."""


@dataclass
class _Process:
    ends_with_run: bool = False
    outcome: RunReport | None = None
    is_done: bool = False


_process = _Process()


def end_with_run() -> None:
    """Say that this process is there for one run; its main thread asks, before the run begins."""
    _process.ends_with_run, _process.outcome, _process.is_done = True, None, False
    # Prefect's engine puts back what it found here when the flow has returned.
    signal.signal(signal.SIGTERM, _end_unless_done)


def _end_unless_done(number: int, frame: FrameType | None) -> None:
    if not _process.is_done:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def keep_outcome(report: RunReport) -> None:
    """Keep the report of a run that has finished, for who finds that Prefect could not be told."""
    _process.outcome = report


def take_outcome() -> RunReport | None:
    """Return the report of the run if it has finished, however its flow ended then."""
    return _process.outcome


def ignore_signals() -> None:
    """Let no signal but SIGKILL end this process any more, if it is there for one run."""
    if not (_process.ends_with_run or deployment.id is not None):
        return  # somebody's own program, which goes on
    if threading.current_thread() is threading.main_thread():
        _process.is_done = True
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
