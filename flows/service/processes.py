"""Processes that outlive the command that started them, and are found and ended without ever hitting a stranger.

Each is the leader of a session of its own, is written down with its start time (a process id is used again, the pair
is not), and carries a mark in its environment that all its descendants inherit. `stop_all` therefore also ends what
a killed worker left behind. The mark alone is not enough: a process that is just becoming another program shows its
parent's environment, or for a moment none, so what is written down and what descends from it counts too.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from flows.service.settings import ServiceError
from tasks import storage

_MARK = "SFT_SERVICE"
_RUN = "PREFECT__FLOW_RUN_ID"  # what a worker tells the process of a run
_START_FIELD = 19  # of /proc/PID/stat behind the name: when the process started, in ticks after boot
_END_SECONDS = 40.0  # Prefect gives a run 30 s to end by itself
_LOG_TAIL_LINES = 15
_SWEEPS = 3
# Of a process without an environment: it has one within microseconds, or was started with none.
_ASKED, _ASK_SECONDS = 4, 0.01
PRIVATE = 0o077  # what servers, workers and runs write is their owner's: databases 600, folders 700
_KERNEL = 2  # parent of the kernel's own threads


def start(folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
    """Start a process in a session of its own, unless it runs already; its output goes to logs/NAME.log."""
    if find(folder, name) is not None:
        return
    log = log_file(folder, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", opener=_open_private) as output:
        process = subprocess.Popen(
            command,
            env={**environment, _MARK: str(folder)},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=PRIVATE,
        )
    process.returncode = 0  # it is meant to outlive this command: no warning that it still runs
    record = {"pid": process.pid, "started": _started(process.pid)}
    _record_file(folder, name).write_text(json.dumps(record), encoding="utf-8")


def find(folder: Path, name: str) -> psutil.Process | None:
    """Return the living process of this name, or None; a recycled process id is not taken for it."""
    path = _record_file(folder, name)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    try:
        process = psutil.Process(record["pid"])
        same = _started(process.pid) == record["started"]
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _started(pid: int) -> str:
    """Return when a process started, in a form that no change of the clock changes.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return f"{int(fields[_START_FIELD])} ticks after boot {boot}"
    except (FileNotFoundError, ProcessLookupError):  # it is gone, or the system has no /proc
        return str(psutil.Process(pid).create_time())


def names(folder: Path) -> list[str]:
    """Return the names of the processes that were started and not stopped, in the order of their start."""
    records = sorted(folder.glob("*.process"), key=lambda path: path.stat().st_mtime)
    return [path.stem for path in records]


def wait_until(answers: Callable[[], bool], folder: Path, name: str, *, seconds: float) -> None:
    """Wait until a process answers.

    Raises:
        ServiceError: it ended, or did not answer in time; with the end of its log.
    """
    deadline = time.monotonic() + seconds
    while not answers():
        ended = find(folder, name) is None
        if ended or time.monotonic() > deadline:
            what = "ended" if ended else f"does not answer after {seconds:.0f} s"
            log = log_file(folder, name)
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
            raise ServiceError(f"{name} {what}. The end of {log}:\n" + "\n".join(lines[-_LOG_TAIL_LINES:]))
        time.sleep(0.2)


def stop(folder: Path, name: str) -> None:
    """End one process and its descendants: ask, wait, then kill.

    A worker that is asked kills its runs at once; so they are asked first, and can keep what they have and say so.
    """
    process = find(folder, name)
    if process is not None:
        runs = [child for child in process.children() if _is_run(child)]
        _end(runs, runs)
        _end([process], [*process.children(recursive=True), process])
    _record_file(folder, name).unlink(missing_ok=True)


def stop_all(folder: Path, order: Sequence[str]) -> int:
    """End everything that was started for this folder, the named ones first and in this order; return how many."""
    before = len(marked(folder))
    for name in [*order, *(name for name in names(folder) if name not in order)]:
        stop(folder, name)
    for _ in range(_SWEEPS):  # what is about to end may start one more
        left = marked(folder)
        if not left:
            break
        _end(left, left)
    return before


def marked(folder: Path) -> list[psutil.Process]:
    """Return all living processes of this folder: written down, carrying its mark, or descending from one of these."""
    found = {process.pid: process for name in names(folder) if (process := find(folder, name)) is not None}
    found |= {process.pid: process for process in psutil.process_iter() if _carries(process, folder)}
    for process in list(found.values()):
        with suppress(psutil.Error):  # gone meanwhile
            found |= {child.pid: child for child in process.children(recursive=True)}
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _is_alive(process)]


def log_file(folder: Path, name: str) -> Path:
    """Return where a process's output goes."""
    return folder / "logs" / f"{name}.log"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder, so that two commands at once do not both start or stop things."""
    folder.mkdir(parents=True, exist_ok=True)
    with storage.make_lock(folder / "lock"):
        yield


def _carries(process: psutil.Process, folder: Path) -> bool:
    """Tell whether a process has the folder's mark; one that is becoming another program is asked again."""
    try:
        for _ in range(_ASKED):
            environment = process.environ()
            if environment or process.status() == psutil.STATUS_ZOMBIE or process.ppid() in (0, _KERNEL):
                break
            time.sleep(_ASK_SECONDS)
        return environment.get(_MARK) == str(folder)
    except psutil.Error:  # gone meanwhile, or another user's
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_run(process: psutil.Process) -> bool:
    try:
        return _RUN in process.environ()
    except psutil.Error:  # gone meanwhile
        return False


def _end(ask: Sequence[psutil.Process], wait_for: Sequence[psutil.Process]) -> None:
    for process in ask:
        _send(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(wait_for, timeout=_END_SECONDS)
    for process in alive:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)  # psutil compares start times first


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _record_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.process"
