"""Calls for the tests of a cluster; a worker imports them by their names."""

import os
import signal
import time
from pathlib import Path

from tasks.allowed_roots import LIMITED, ROOTS
from tasks.ingestion import shard_runner
from tasks.ingestion.shards import Shard


def double(read: Path, number: int, made: Path) -> int:
    """Write what was read twice; fail for numbers below 0, the later ones sooner."""
    if number < 0:
        time.sleep(0.2 * (10 + number))
        raise ValueError(f"call {number} of {read.name}")
    made.mkdir()
    (made / "deep").mkdir()
    (made / "deep" / "twice.bin").write_bytes(read.read_bytes() * 2)
    return os.getpid()


def read_limit() -> str | None:
    """Return what limits the addresses that are read."""
    return os.environ.get(ROOTS) if os.environ.get(LIMITED) else None


def finish_shard_or_die(shard: Shard, folder: Path, max_rows: int | None, store: str | None, marks: Path) -> int:
    """Read a shard; the first worker that comes to the second part is killed when it has read it."""
    num_rows = shard_runner.finish_shard(shard, folder, max_rows, store)
    if shard.parts[0].span.first_row > 1:
        try:
            (marks / "killed").mkdir()
        except FileExistsError:
            return num_rows
        os.kill(os.getpid(), signal.SIGKILL)
    return num_rows


def rest(seconds: float) -> float:
    """Take so long, without a core."""
    time.sleep(seconds)
    return seconds
