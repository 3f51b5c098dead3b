"""How CPU work is spread: `map(function, calls)` over one pool of processes, or a Ray cluster where one is named.

This is the one place that knows it; callers give functions and arguments that pickle, and know of no process. The pool
is made at the first call.

Workers come from a fork server, which has imported what they need (preloading.py): they start in milliseconds, inherit
no thread and no lock, and end when this process does, however it dies (each waits for that in a thread).
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

from tasks import cluster, cluster_connection
from tasks.parcels import Parcel
from tasks.progress import Tell

_PRELOADED = ["tasks.preloading"]
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_MAX_LOST = 2
"""How often calls with models are made again after one of their processes was lost."""

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
        if _pool is not None:
            try:
                return _pool.submit(function, *args, **kwargs)
            except BrokenProcessPool:  # a worker was killed: what it did is lost, what comes now need not be
                _pool.shutdown(wait=False)
        _pool = ProcessPoolExecutor(count_cores(), mp_context=_prepare_context(), initializer=_prepare)
        return _pool.submit(function, *args, **kwargs)


def call(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function that pickles in a worker and return its result; raise what it raises."""
    return submit(function, *args, **kwargs).result()


def spreads_to_cluster() -> bool:
    """Tell whether `map` sends its calls to a Ray cluster (SFT_RAY_ADDRESS): whoever would spread them need not."""
    return cluster_connection.is_named()


def map(
    function: Callable[..., R],
    calls: Sequence[Sequence[Any]],
    *,
    parcel: Callable[..., Parcel],
    tell: Tell = lambda num_done, num_all: None,
) -> list[R]:
    """Run a function on each tuple of arguments, spread over the cores; return the results in the order of the calls.

    Args:
        function: a module's.
        calls: its arguments.
        parcel: given the arguments of a call, says what it reads and makes on the disk, which machines of a cluster do
            not share.
        tell: is told the calls that have ended, and all.

    Raises:
        Exception: what the first call in order that fails raises; calls that wait are then not started.
    """
    if cluster_connection.is_named():
        return cluster.map(function, calls, parcel, tell)
    futures = [submit(function, *arguments) for arguments in calls]
    results = []
    try:
        for number, future in enumerate(futures, start=1):
            results.append(future.result())
            tell(number, len(calls))
    finally:
        for future in futures:
            future.cancel()
    return results


class MapModels(Protocol):
    """As `map`, for functions that run models."""

    def __call__(
        self, function: Callable[..., R], calls: Sequence[Sequence[Any]], *, parcel: Callable[..., Parcel], tell: Tell
    ) -> list[R]:
        """Run a function on each tuple of arguments; return the results in the order of the calls."""
        ...


def count_model_places(kind: str) -> int:
    """Return how many calls with a model a named cluster runs at a time on such a device; 0 where none is named.

    Args:
        kind: cuda or cpu.

    Raises:
        ClusterError: it cannot be used.
    """
    return cluster.count_devices(kind) if cluster_connection.is_named() else 0


def list_devices() -> list[str]:
    """Return the GPUs that the environment shows, by the names that it has for them; none where it shows all."""
    return [name for name in os.environ.get(_VISIBLE, "").split(",") if name]


@contextmanager
def model_workers(devices: Sequence[str] | None, *, kind: str) -> Iterator[MapModels]:
    """Give a `map` for functions that run models, in processes that last as long as the body.

    Args:
        devices: of each process of this machine, as CUDA_VISIBLE_DEVICES names it; empty for the CPU. None: the
            processes are the cluster's.
        kind: cuda or cpu.
    """
    if devices is None:
        yield partial(cluster.map, device=kind)
        return
    workers = _ModelWorkers(devices)
    try:
        yield workers.map
    finally:
        workers.end()


class _ModelWorkers:
    """Processes that are not forked: a device's library would not survive it."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = devices
        self._start()

    def map(
        self, function: Callable[..., R], calls: Sequence[Sequence[Any]], *, parcel: Callable[..., Parcel], tell: Tell
    ) -> list[R]:
        """As `map`; where a process is lost, calls without a result are made again by new ones."""
        results: dict[int, R] = {}
        for attempt in range(_MAX_LOST + 1):
            with _hidden_main():
                waiting = [number for number in range(len(calls)) if number not in results]
                futures = {number: self._pool.submit(function, *calls[number]) for number in waiting}
            try:
                for number, future in futures.items():
                    results[number] = future.result()
                    tell(len(results), len(calls))
                break
            except BrokenProcessPool:
                if attempt == _MAX_LOST:
                    raise
                self.end()
                self._start()
        return [results[number] for number in range(len(calls))]

    def end(self) -> None:
        """End the processes, whatever they are at."""
        self._line.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        end, self._line = context.Pipe(duplex=False)  # no lock that a killed process could hold
        seats = context.SimpleQueue()
        for device in self._devices:
            seats.put(device)
        given = (seats, end, max(1, count_cores() // len(self._devices)))
        self._pool = ProcessPoolExecutor(len(self._devices), context, initializer=_take_seat, initargs=given)


def _take_seat(seats: Any, end: Any, num_threads: int) -> None:
    """Take a device before anything that uses it is imported; end when the parent closes the line, or dies."""
    device = seats.get()
    if device:
        os.environ[_VISIBLE] = device
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    threading.Thread(target=_end_with_line, args=(end,), daemon=True).start()


def _end_with_line(end: Any) -> None:
    with suppress(OSError, EOFError):
        end.recv()
    os._exit(0)


def _prepare_context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def stop() -> None:
    """End the workers and leave the cluster; the next call makes new ones."""
    global _pool
    cluster_connection.stop()
    with _lock:
        if _pool is not None:
            _pool.shutdown(wait=True, cancel_futures=True)
        _pool = None


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
    """Keep a worker to its parent's life."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
