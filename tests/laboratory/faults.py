"""What can go wrong with a run: each fault gets the bench, the home, the attempt under way, and a draw."""

import os
import resource
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import psutil

from tests.laboratory.bench import CLOCK, CLOCK_FILE, Attempt, Bench
from tests.laboratory.damage import cut, delete, flip
from tests.laboratory.processes import list_family

_LOCK_SECONDS = 30.0


def kill(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """End the run without a word."""
    attempt.signal(signal.SIGKILL)


def terminate(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Ask the run to end, as a scheduler does; kill it when it does not."""
    attempt.process.send_signal(signal.SIGTERM)
    if attempt.wait(30) is None:
        attempt.signal(signal.SIGKILL)


def interrupt(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Press Ctrl-C."""
    attempt.signal(signal.SIGINT)


def pause(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Stop all processes for some seconds."""
    attempt.signal(signal.SIGSTOP)
    time.sleep(draw.uniform(1.0, 6.0))
    attempt.signal(signal.SIGCONT)


def stutter(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Let the processes run for a tenth of the time only, as on a disk that hardly answers."""
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        attempt.signal(signal.SIGSTOP)
        time.sleep(0.18)
        attempt.signal(signal.SIGCONT)
        time.sleep(0.02)


def fill_disk(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Leave no room on the disk until the run ends, or let files grow no further where no disk can be made."""
    if os.path.ismount(home):
        with (home / "ballast").open("wb") as file, suppress(OSError):
            while True:
                file.write(b"\0" * 65_536)
                file.flush()
    else:
        limit = draw.choice((1, 100_000, 1_000_000))
        for process in list_family(attempt.process.pid):
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    attempt.finish()
    with suppress(FileNotFoundError):
        (home / "ballast").unlink()


def lose_server(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Kill the Prefect server, and bring it back after a while."""
    bench.stop_server()
    time.sleep(draw.uniform(0.0, 4.0))
    bench.start_server()


def freeze_server(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Let the Prefect server answer nothing for a while."""
    bench.stop_server(signal.SIGSTOP)
    time.sleep(draw.uniform(1.0, 8.0))
    bench.stop_server(signal.SIGCONT)


def change_clock(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Set the clock of the run's machine a day forward or an hour back, and kill the run in some of the cases."""
    (home / CLOCK_FILE).write_text(draw.choice(("+1d", "-1h")))
    if draw.random() < 0.3:
        time.sleep(2.0)
        attempt.signal(signal.SIGKILL)


def lock_database(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Hold MLflow's or Prefect's database for half a minute, as somebody does who copies it or looks into it."""
    path = draw.choice((home / "mlflow.db", bench.folder / "prefect" / "prefect.db"))
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(_LOCK_SECONDS)
        database.execute("ROLLBACK")


def damage(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Change a file that the run has left on the disk; kill it in half of the cases."""
    files = sorted(file for name in ("cache", "results", "runs") for file in _find_files(home / name))
    if draw.random() < 0.5:
        attempt.signal(signal.SIGKILL)
    with suppress(OSError, ValueError):  # the run goes on, and may have deleted or emptied it
        if files:
            draw.choice((flip, flip, cut, delete))(draw.choice(files), draw)


def _find_files(folder: Path) -> Iterator[Path]:
    """Give the finished files below a folder in which a run works; what it still writes has no digest yet."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "new" and not name.startswith(".partial-")]
        for file in (Path(place) / name for name in names if name != "lock"):
            with suppress(OSError):
                if file.stat().st_size:
                    yield file


def clear(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Delete a part of the home under a run, as somebody who needs room does."""
    name = draw.choice(("cache", "results", "runs", "cache", "artifacts"))
    shutil.rmtree(home / name, ignore_errors=True)


FAULTS: dict[str, Callable[[Bench, Path, Attempt, Random], None]] = {
    each.__name__: each
    for each in (
        *(kill, terminate, interrupt, pause, stutter),
        *(fill_disk, lose_server, freeze_server, damage, clear, lock_database),
        *((change_clock,) if CLOCK is not None else ()),
    )
}
