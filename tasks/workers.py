"""One pool of processes for the CPU work of shards, made when it is first asked for.

Workers come from a fork server: they inherit no thread and no lock. Each watches the process that it works for, and
ends when that does, however it dies.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.Lock()
_pool: ProcessPoolExecutor | None = None


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def submit(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "Future[R]":
    """Start a function that pickles in a worker; what it raises comes out of the future."""
    global _pool
    with _lock, _hidden_main():
        if _pool is None:
            _pool = ProcessPoolExecutor(count_cores(), mp_context=get_context("forkserver"), initializer=_prepare)
        return _pool.submit(function, *args, **kwargs)


def call(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function that pickles in a worker and return its result; raise what it raises."""
    return submit(function, *args, **kwargs).result()


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep a worker that is started meanwhile from importing the program, with all that it imports."""
    main = sys.modules["__main__"]
    spec, file = main.__spec__, getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _prepare() -> None:
    """Keep a worker to one core, as there is one for each, and let it end with the process that it works for."""
    threading.Thread(target=_watch_parent, daemon=True).start()
    os.environ["POLARS_MAX_THREADS"] = os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"


def _watch_parent() -> None:
    """Wait until the parent is gone, and end this process as it stands."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
