"""A place where runs are started over and over: a Prefect server, homes on small disks, and attempts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.laboratory.processes import cpu_seconds, list_family, list_processes

ROOT = Path(__file__).resolve().parents[2]
NAME, LOST = "crash-laboratory", "none"
_ROWS = 60
_IDLE_SECONDS = 240.0
"""A run that computes nothing for so long hangs. On a busy machine one that works may take many times longer."""
_PATIENCE_SECONDS = 1200.0
_LEAST_CPU_SECONDS = 1.0
_DISK_BYTES = 400 << 20
_SERVER_START_SECONDS = 300.0
CLOCK = next((str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
"""Debian's libfaketime, which lets a process see another clock; None where it is not installed.

A run under it computes four times as long (51 in place of 13 processor seconds).
"""
CLOCK_FILE = "clock"  # of a home: how far its runs' clock is off
# As when a machine's clock is set: the monotonic one goes on, and so do the times that files have already.
_CLOCK = {
    "LD_PRELOAD": str(CLOCK),
    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    "NO_FAKE_STAT": "1",
    "FAKETIME_CACHE_DURATION": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).with_name('clock')}",
}


class Bench:
    """A Prefect server, a home to copy and the config that all runs have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "run.yaml"
        rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}."} for n in range(_ROWS)]
        rows += [{"prompt": "Say 1.", "completion": ""}, rows[5]]  # a reject and a duplicate
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = {
            "name": NAME,
            "model": {"base_model": str(ROOT / "deploy" / "demo" / "base_model")},
            "data": {"source": str(folder / "rows.jsonl"), "max_rejected_fraction": 0.1},
            "training": {"rank": 4, "alpha": 8, "micro_batch": 4, "max_steps": 60, "checkpoint_every_steps": 8},
            "evaluation": {"max_new_tokens": 4, "num_resamples": 100, "max_examples": 8},
            "registry": {"name": NAME},
        }
        self.config.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
        self.port = _find_port()
        self.server: subprocess.Popen[bytes] | None = None

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables of a run, by which its processes are found again."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SFT_"))
        }
        return {
            **kept,
            "SFT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_HOME": str(self.folder / "prefect"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
        }

    def start_server(self) -> None:
        """Start the Prefect server and wait until it answers."""
        environment = {**self.environment(self.folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        deadline = time.monotonic() + _SERVER_START_SECONDS
        while not _answers(self.port):
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text(errors="replace")[-2000:]
            time.sleep(0.3)

    def stop_server(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the Prefect server; it is started again by `start_server`."""
        assert self.server is not None
        with suppress(ProcessLookupError):
            os.killpg(self.server.pid, number)
        if number == signal.SIGKILL:
            self.server.wait()

    def start(self, home: Path, *arguments: str, follows_clock: bool = False) -> "Attempt":
        """Start `sft run`, by the clock of its home where that is going to be set."""
        return Attempt(self, home, arguments, follows_clock=follows_clock)


class Attempt:
    """One start of `sft run`."""

    def __init__(self, bench: Bench, home: Path, arguments: tuple[str, ...], *, follows_clock: bool) -> None:
        command = [sys.executable, "-m", "flows.cli", "run", str(bench.config), *arguments]
        self._said: list[bytes] = []
        self.process = subprocess.Popen(
            command,
            env={**bench.environment(home), **(_follow_clock(home) if follows_clock else {})},
            cwd=ROOT,
            stdout=subprocess.PIPE,  # a file would have the limits of the run's own files
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self._said.extend(iter(self.process.stdout.readline, b""))

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None when it goes on after so long."""
        try:
            return self.process.wait(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None

    def finish(self) -> int | None:
        """Return the exit code, or None when it hangs."""
        end = time.monotonic() + _PATIENCE_SECONDS
        idle_since, before = time.monotonic(), 0.0
        while (code := self.wait(5.0)) is None and time.monotonic() < end:
            spent = sum(cpu_seconds(process) for process in list_family(self.process.pid))
            if abs(spent - before) > _LEAST_CPU_SECONDS:  # less, where a process of the family has ended
                idle_since, before = time.monotonic(), spent
            if time.monotonic() - idle_since > _IDLE_SECONDS:
                break
        return code

    def signal(self, number: int) -> None:
        """Send a signal to the run and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def read(self) -> str:
        """Return what it printed."""
        if self.process.poll() is not None:
            self._listener.join(5.0)  # another process may hold the pipe
        return b"".join(list(self._said)).decode(errors="replace")


def _follow_clock(home: Path) -> dict[str, str]:
    """Return the variables that let a process follow the clock of a home."""
    return {**_CLOCK, "FAKETIME_TIMESTAMP_FILE": str(home / CLOCK_FILE)}


@contextmanager
def new_home(folder: Path, template: Path) -> Iterator[Path]:
    """Give a home with an empty tracking database, on a small disk of its own where that is allowed."""
    home = Path(tempfile.mkdtemp(dir=folder, prefix="home-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(home)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        shutil.copytree(template, home, dirs_exist_ok=True)
        (home / CLOCK_FILE).write_text("+0")
        yield home
    finally:
        for process in list_processes(home):
            with suppress(psutil.Error):
                process.kill()
        if mounted:
            subprocess.run(["umount", "-l", str(home)], check=True)
        shutil.rmtree(home, ignore_errors=True)


def _find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(port: int) -> bool:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False
