"""A training process's connection to its launcher: it sends what happens, receives a stop, and ends when it breaks.

It breaks when the launcher dies, however it dies. Two guards then end the process and what it has started: a
thread that waits on the connection, and, on Linux, the kernel itself (PR_SET_PDEATHSIG), in case no thread gets to run.
"""

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any, NoReturn

from tasks.training.process.messages import ADDRESS_VARIABLE, STOP, encode

BEAT_SECONDS = 1.0
_CLOSE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class WorkerConnection:
    """The connection, with a thread that sends (and beats while there is nothing to send) and one that listens.

    Where torchrun itself has started the process there is no launcher: what it says of its log goes to its output.
    """

    def __init__(self, address: str | None, *, role: str) -> None:
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._has_begun = threading.Event()
        self._is_closing = threading.Event()
        self._is_alone = address is None
        if address is None:
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(address)
        self._sender = threading.Thread(target=self._send_all, name="connection-sender", daemon=True)
        self._sender.start()
        self.send("hello", pid=os.getpid(), role=role)
        threading.Thread(target=self._listen, name="connection-listener", daemon=True).start()

    def send(self, kind: str, /, **values: Any) -> None:
        """Send a line, without waiting for it to be read."""
        if not self._is_alone:
            self._waiting.put(encode(kind, values))
        elif kind == "log":
            print(values["message"], file=sys.stderr, flush=True)  # noqa: T201

    def was_asked_to_stop(self) -> bool:
        """Say whether this process was asked to stop, and not another one of its training alone."""
        return self._stop.is_set()

    def should_stop(self) -> bool:
        """Say whether a stop was asked for. From the first call on, stopping is left to the caller."""
        self._has_begun.set()
        return self._stop.is_set()

    def ask_to_stop(self) -> None:
        """Note that the training should stop; before its first step there is nothing to keep: the process ends."""
        self._stop.set()
        if not self._has_begun.is_set():
            self.send("stopped")
            self.close()
            os._exit(0)

    def close(self) -> None:
        """Send what is waiting and close."""
        if self._is_alone:
            return
        self._is_closing.set()
        self._waiting.put(None)
        self._sender.join(_CLOSE_SECONDS)
        self._socket.close()

    def _send_all(self) -> None:
        while True:
            try:
                content = self._waiting.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                content = encode("beat", {})
            if content is None:
                return
            try:
                self._socket.sendall(content)
            except OSError:
                if self._is_closing.is_set():
                    return
                _end_group()

    def _listen(self) -> None:
        while True:
            try:
                heard = self._socket.recv(len(STOP))
            except OSError:
                heard = b""
            if heard:
                self.ask_to_stop()
            elif self._is_closing.is_set():
                return
            else:
                _end_group()


class LogSender(logging.Handler):
    """Sends log lines over the connection, to be shown where the launcher runs."""

    def __init__(self, connection: WorkerConnection) -> None:
        super().__init__(logging.INFO)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """Send our own lines from INFO on, and those of libraries from WARNING on."""
        if record.levelno >= logging.WARNING or record.name.startswith("tasks."):
            self._connection.send("log", level=record.levelno, message=record.getMessage())


def connect_worker(*, role: str) -> WorkerConnection:
    """Connect this process to its launcher, and tie its life to its parent's."""
    _die_with_parent()
    return WorkerConnection(os.environ.get(ADDRESS_VARIABLE), role=role)


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died just before
        _end_group()


def _end_group() -> NoReturn:
    """End this process and its helpers (such as compilers) at once."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
