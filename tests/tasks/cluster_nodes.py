"""Machines of a Ray cluster, each as `ray start` starts it, all on this one."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_ATTEMPTS = 4
_SECONDS = 120


@dataclass
class Nodes:
    """The machines, and where the cluster is."""

    address: str
    folder: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def join(self) -> subprocess.Popen[bytes]:
        """Start a further machine with one core."""
        options = [
            "--head",
            "--include-dashboard=false",
            f"--port={self.address.rpartition(':')[2]}",
            f"--temp-dir={self.folder}",
        ]
        if self.processes:
            options = [f"--address={self.address}"]
        for _ in range(_ATTEMPTS):  # a busy machine's nodes fail: github.com/ray-project/ray/issues/65983
            process = self._start(options)
            if process is not None:
                self.processes.append(process)
                return process
        raise AssertionError("no node started")

    def _start(self, options: list[str]) -> subprocess.Popen[bytes] | None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--block"]
        command += ["--object-store-memory=200000000", "--disable-usage-stats"]
        log = Path(self.folder) / f"node-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            process = subprocess.Popen([*command, *options], stdout=output, stderr=output, start_new_session=True)
        end = time.monotonic() + _SECONDS
        while process.poll() is None and time.monotonic() < end:
            if b"Ray runtime started" in log.read_bytes():
                return process
            time.sleep(0.2)
        self.kill(process)
        return None

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Let a machine be gone at once, with all its processes."""
        try:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        except psutil.NoSuchProcess:
            return
        for member in family:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.wait()


@contextmanager
def start_nodes(number: int) -> Iterator[Nodes]:
    """Start a cluster of so many machines; they end with the body."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # A short path: the sockets in it may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(f"127.0.0.1:{port}", folder)
        try:
            for _ in range(number):
                nodes.join()
            yield nodes
        finally:
            for process in nodes.processes:
                nodes.kill(process)
