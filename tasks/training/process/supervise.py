"""The launcher's side of a training: it starts the processes, receives what they send, and stops them all."""

import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from json import loads
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tasks.training.process.ahead import choose_environment, give_job
from tasks.training.process.attendance import Attendance
from tasks.training.process.failures import choose_error, is_known, name_end, read_tail, shorten_message
from tasks.training.process.messages import ADDRESS_VARIABLE, STOP, read_evaluation, read_outcome, read_step
from tasks.training.records import (
    EvalRecord,
    StepRecord,
    TrainingCrash,
    TrainingOutcome,
    TrainingStopped,
)

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2
_START_SECONDS = 120.0  # until a process has said its first word
_EXIT_SECONDS = 20.0  # from the outcome to the end of the processes
_PEERS_SECONDS = 1.5  # after an error, for the process that knows the cause to say it too


@dataclass(frozen=True)
class Listeners:
    """Who is told what."""

    on_step: Callable[[StepRecord], None]
    on_eval: Callable[[EvalRecord], None]
    on_log: Callable[[int, str], None]


@dataclass
class _Connection:
    """One process's connection."""

    socket: socket.socket
    heard: float
    pid: int | None = None
    role: str = "?"
    has_ended: bool = False
    """It has said how it ends."""
    buffer: bytearray = field(default_factory=bytearray)


class Supervisor:
    """Holds a training's processes: a context, at whose end none of them is alive."""

    def __init__(
        self, listeners: Listeners, log: Path, *, silence_seconds: float, attendance: Attendance | None = None
    ) -> None:
        """Begin.

        Args:
            listeners: who is told what.
            log: of the processes.
            silence_seconds: a process that says nothing for so long is taken for dead.
            attendance: of a team, whose agents start lost processes again: the loss of one is no error then.
        """
        self._attendance = attendance
        self._listeners = listeners
        self._log = log
        self._silence_seconds = silence_seconds
        self._folder = Path(tempfile.mkdtemp(prefix="sft-"))  # mode 700; run folders are too long for a socket's name
        self._selector = selectors.DefaultSelector()
        self._connections: list[_Connection] = []
        self._unhandled: deque[tuple[_Connection, dict[str, Any]]] = deque()
        self._known: dict[int, psutil.Process] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._outcome: TrainingOutcome | None = None
        self._errors: list[dict[str, Any]] = []
        self._is_stopped = False
        self._is_stopping = False
        self._has_given_up = False
        self._has_spoken = False

    def __enter__(self) -> Self:
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(self._folder / "socket"))
        self._server.listen()
        self._selector.register(self._server, selectors.EVENT_READ)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()
        for connection in self._connections:
            connection.socket.close()
        self._selector.close()
        self._server.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, arguments: Sequence[str], *, ahead: subprocess.Popen[bytes] | None = None) -> None:
        """Start the first process, in a session and group of its own: Ctrl-C at the terminal is for us alone.

        Args:
            arguments: of Python.
            ahead: a process that waits for such a job, and is then used.
        """
        address = str(self._folder / "socket")
        if ahead is not None and give_job(ahead, arguments, self._log, address):
            self._process = ahead
        else:
            with self._log.open("wb") as output:
                self._process = subprocess.Popen(
                    [sys.executable, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**choose_environment(), ADDRESS_VARIABLE: address},
                    start_new_session=True,
                )
        self._note_process(self._process.pid)
        self._started = time.monotonic()

    def wait(self) -> TrainingOutcome:
        """Pass on what is heard until all have ended; return the outcome.

        From the outcome on, nothing that happens to the processes changes the result: a process that takes long to
        end, falls silent or fails in its own ending has trained all the same.

        Raises:
            TrainingError, CheckpointError: as the process did.
            TrainingCrash: a process died or fell silent.
            TrainingStopped: somebody stopped the processes from outside.
        """
        assert self._process is not None
        ended: float | None = None
        while self._process.poll() is None:
            is_idle = not self._receive()
            if ended is None and (self._outcome or self._has_failed()):
                ended = time.monotonic()
            if ended is None:
                if is_idle:
                    self._check_silence()
            else:
                patience = _EXIT_SECONDS if self._outcome else _PEERS_SECONDS
                if time.monotonic() - ended > patience:
                    break
        while self._receive(wait=False):
            pass
        if self._outcome is not None:
            if self._errors:
                logger.warning("After the training had ended: %s", choose_error(self._errors, self._log))
            return self._outcome
        if self._errors and not (self._attendance and self._is_stopped):
            raise choose_error(self._errors, self._log)
        if self._is_stopped:
            raise TrainingStopped("the training's processes were stopped from outside, after a checkpoint")
        raise TrainingCrash(f"the training's process {name_end(self._process.poll())}{read_tail(self._log)}")

    def stop(self, seconds: float) -> None:
        """Ask the ranks to write a checkpoint and leave, and wait for it at most so long.

        As long as there is no rank, nothing has been trained, and there is nothing to wait for.
        """
        ranks = [connection for connection in self._connections if connection.role == "rank"]
        is_over = self._process is None or self._process.poll() is not None or self._has_failed() or self._has_given_up
        if is_over or not ranks:
            return
        logger.warning("Stopping after a checkpoint; a second interruption would not wait for it")
        self._is_stopping = True
        for connection in ranks:
            self._send_stop(connection)
        deadline = time.monotonic() + seconds
        is_alive = True
        while is_alive and time.monotonic() < deadline:
            is_alive = self._lives()
            try:
                self._receive(wait=is_alive)
            except Exception as error:  # a listener that fails now must not keep the training from ending
                logger.warning("While stopping the training: %s", error)
                silent = lambda *values: None  # noqa: E731
                self._listeners = Listeners(silent, silent, silent)
        if is_alive and self._lives():
            logger.warning("The training did not stop within %.0f s and was killed", seconds)

    def _has_failed(self) -> bool:
        """Say whether the training is over by an error. In a team, only one that would come again ends it."""
        return any(self._attendance is None or is_known(error) for error in self._errors)

    def _lives(self) -> bool:
        """Say whether there is somebody to wait for. A team's agent would wait for the other machines."""
        assert self._process is not None
        has_ranks = any(connection.role == "rank" for connection in self._connections)
        return self._process.poll() is None and (self._attendance is None or has_ranks)

    def _receive(self, *, wait: bool = True) -> bool:
        """Take in what has come, and pass it on; return whether anything has come."""
        ready = self._selector.select(_TICK_SECONDS if wait else 0.0)
        for key, _ in ready:
            if key.data is None:
                self._accept()
            else:
                self._read(key.data)
        while self._unhandled:  # an interruption in between leaves the rest for the next time
            self._handle(*self._unhandled.popleft())
        return bool(ready)

    def _accept(self) -> None:
        accepted, _ = self._server.accept()
        self._has_spoken = True
        connection = _Connection(accepted, time.monotonic())
        self._connections.append(connection)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _read(self, connection: _Connection) -> None:
        try:
            content = connection.socket.recv(1 << 16)
        except OSError:
            content = b""
        if not content:
            self._selector.unregister(connection.socket)
            connection.socket.close()
            self._connections.remove(connection)
            if self._attendance is not None and connection.role == "rank" and not connection.has_ended:
                self._attendance.note_failure("no word")
            return
        connection.heard = time.monotonic()
        connection.buffer += content
        *whole, rest = bytes(connection.buffer).split(b"\n")
        connection.buffer = bytearray(rest)
        self._unhandled.extend((connection, loads(text)) for text in whole)

    def _handle(self, connection: _Connection, values: dict[str, Any]) -> None:
        kind = values["kind"]
        connection.has_ended |= kind in ("outcome", "stopped", "error")
        if kind == "hello":
            connection.pid, connection.role = int(values["pid"]), str(values["role"])
            self._note_process(connection.pid)
            if self._attendance is not None and connection.role == "rank" and not self._has_failed():
                self._errors, self._is_stopped = [], False  # of the round before
            if self._is_stopping and connection.role == "rank":
                self._send_stop(connection)
        elif kind == "team":
            if self._attendance is not None:
                self._attendance.note_round(values["machines"], values["num_processes"])
        elif kind == "step":
            if self._attendance is not None:
                self._attendance.note_step(values["step"])
            self._listeners.on_step(read_step(values))
        elif kind == "eval":
            self._listeners.on_eval(read_evaluation(values))
        elif kind == "log":
            self._listeners.on_log(values["level"], values["message"])
        elif kind == "outcome":
            self._outcome = read_outcome(values)
        elif kind == "stopped":
            self._is_stopped = True
        elif kind == "error":
            self._errors.append(values)
            if self._attendance is not None:
                self._attendance.note_failure(f"{values['type']}: {shorten_message(values['message'])}")

    def _send_stop(self, connection: _Connection) -> None:
        with suppress(OSError):
            connection.socket.sendall(STOP)

    def _check_silence(self) -> None:
        """Raise TrainingCrash when a process beats no more, or none ever spoke."""
        now = time.monotonic()
        for connection in self._connections:
            if now - connection.heard > self._silence_seconds:
                self._has_given_up = True
                raise TrainingCrash(
                    f"the training's process {connection.pid} ({connection.role}) gave no sign of life for "
                    f"{now - connection.heard:.0f} s and was killed: it was stopped, or the machine is out of memory. "
                    f"The same command goes on from the last checkpoint{read_tail(self._log)}"
                )
        if not self._has_spoken and now - self._started > _START_SECONDS:
            self._has_given_up = True
            raise TrainingCrash(
                f"the training's process did not start within {_START_SECONDS:.0f} s{read_tail(self._log)}"
            )

    def _note_process(self, pid: int) -> None:
        with suppress(psutil.NoSuchProcess):
            self._known[pid] = psutil.Process(pid)

    def _kill(self) -> None:
        """Kill every process that has spoken, with its group; none is left afterwards."""
        for pid, known in self._known.items():
            # Each leads a group of its own. A number that now belongs to a stranger is left alone.
            with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                if not psutil.pid_exists(pid) or psutil.Process(pid) == known:
                    os.killpg(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
