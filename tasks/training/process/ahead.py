"""Starts a training process before there is a job for it, because its imports take longer than a short training.

It waits on its standard input for a line with the job, and ends when that closes: no job came, or this process died.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_lock = threading.Lock()
_waiting: subprocess.Popen[bytes] | None = None


def start_ahead() -> None:
    """Start a process that waits for a job, where this machine has an NVIDIA GPU and none waits yet."""
    global _waiting
    if not Path("/proc/driver/nvidia/version").exists():
        return
    with _lock:
        if _waiting is None or _waiting.poll() is not None:
            _waiting = start_waiting(choose_environment())


def start_waiting(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that waits for a job, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.training.process.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(environment),
        start_new_session=True,
    )


def take_waiting() -> subprocess.Popen[bytes] | None:
    """Return the process that waits, which is then the caller's; None where there is none."""
    global _waiting
    with _lock:
        process, _waiting = _waiting, None
    return process if process is not None and process.poll() is None else None


def give_job(process: subprocess.Popen[bytes], arguments: Sequence[str], log: Path, address: str) -> bool:
    """Tell a waiting process what to do; say whether it heard."""
    order: dict[str, Any] = {
        "arguments": list(arguments),
        "log": str(log),
        "address": address,
        "folder": str(Path.cwd()),
    }
    order["environment"] = dict(os.environ)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
    except OSError:
        return False
    return True


def choose_environment() -> dict[str, str]:
    """Return the environment of a training process: this one's, with the allocator's setting where nobody chose one.

    Every step has other shapes: with expandable segments the memory of one serves the next. No step became faster by it
    where memory was plenty.
    """
    chosen = {} if _ALLOCATOR_VARIABLES & set(os.environ) else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return {**os.environ, **chosen}


_ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


@atexit.register
def _end_waiting() -> None:
    process = take_waiting()
    if process is not None:
        with suppress(OSError):
            process.kill()
        process.wait()
