"""Calls on a Ray cluster, which SFT_RAY_ADDRESS names: plain tasks of one driver, and no shared disk.

What a call reads is sent with it, and the folder that it makes comes back. So many calls are under way as keep all
cores busy, so that neither this process nor the cluster's object store grows with their number. A call whose worker or
machine is lost is made again; what it had made is gone with it.
"""

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.allowed_roots import LIMITED, ROOTS
from tasks.cluster_connection import ADDRESS, ClusterError, connect
from tasks.dependencies import digest_files, list_libraries
from tasks.parcels import Enclosure, Parcel
from tasks.progress import Tell

_BLOCK_BYTES = 32 << 20
_CALLS_A_CORE = 2
_WITH_MODELS = {"SFT_RUNS_MODELS": "1"}
_MAX_LOST = 5
"""How often a call is made again after its worker was lost."""

Blocks = list[tuple[int, Any]]
"""Where each block begins, and the reference to its bytes."""
Sent = tuple[Path, str, list[tuple[str, int, Blocks]]]
"""The path with the sender, a digest where it is kept, and of each file its name below the path, size and blocks."""


def map(
    function: Callable[..., Any],
    calls: Sequence[Sequence[Any]],
    parcel: Callable[..., Parcel],
    tell: Tell,
    *,
    device: str | None = None,
) -> list[Any]:
    """Run a function on each tuple of arguments; return the results in the order of the calls.

    Args:
        function: a module's; it reads and makes what its parcel says, and nothing else of a disk.
        calls: its arguments.
        parcel: given a call's arguments, says what it reads and makes.
        tell: of calls that have ended.
        device: cuda or cpu, of functions that run models; their processes are apart from those of other calls.

    Raises:
        ClusterError: see there.
        Exception: what the first call in order that fails raises; calls that wait are then not started.
    """
    ray = connect()
    send = _prepare(ray, function, parcel, device)
    waiting, running = list(range(len(calls)))[::-1], dict[Any, int]()
    places = dict[int, Path | None]()
    results, failures = [None] * len(calls), dict[int, Exception]()
    try:
        while waiting or running:
            while waiting and not failures and len(running) < _count_places(ray, device):
                number = waiting.pop()
                reference, places[number] = send(calls[number])
                running[reference] = number
            if failures and min(failures) < min(running.values(), default=len(calls)):
                break
            for done in ray.wait(list(running), num_returns=1)[0]:
                number = running.pop(done)
                try:
                    results[number] = _receive(ray, done, places[number])
                except Exception as error:
                    failures[number] = error
                tell(len(calls) - len(waiting) - len(running), len(calls))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    if failures:
        raise failures[min(failures)]
    return results


def count_devices(kind: str) -> int:
    """Return how many calls that run models the cluster does at a time on its GPUs (cuda) or its cores (cpu).

    Raises:
        ClusterError: nothing answers.
    """
    return int(connect().cluster_resources().get("GPU" if kind == "cuda" else "CPU", 0))


def _count_places(ray: Any, device: str | None) -> int:
    """Return how many calls may be under way; machines come and go.

    Raises:
        ClusterError: there is no core, or no GPU where one is wanted.
    """
    if device == "cuda" and not count_devices(device):
        raise ClusterError(
            f"{ADDRESS} = {os.environ[ADDRESS]}: the cluster has lost all of its GPUs: start the run again"
        )
    cores = count_devices(device or "cpu")
    if not cores:
        raise ClusterError(
            f"{ADDRESS} = {os.environ[ADDRESS]}: no machine of the cluster has a core for calls: join one by "
            "`ray start --address=HEAD:6379`"
        )
    return _CALLS_A_CORE * cores


def _prepare(
    ray: Any, function: Callable[..., Any], parcel: Callable[..., Parcel], device: str | None
) -> Callable[[Sequence[Any]], tuple[Any, Path | None]]:
    """Return what sends a call, and gives the reference to its outcome, and the folder that it makes."""

    def work(*sent: Any) -> Any:  # by value: a worker without the product, or with another one, is told so
        import importlib
        import socket

        try:
            worker = importlib.import_module("tasks.cluster_worker")
        except ImportError as error:
            raise RuntimeError(f"{socket.gethostname()} does not have the product: {error}") from None
        return worker.work(*sent)

    module = function.__module__
    wanted = {"code": digest_files(module), **list_libraries(module)}
    # Other variables, other processes: those that read data have made themselves ready for nothing else.
    apart = {} if device is None else {"num_gpus": int(device == "cuda"), "runtime_env": {"env_vars": _WITH_MODELS}}
    task = ray.remote(num_cpus=1, max_retries=_MAX_LOST, **apart)(work)
    common: dict[Path, Sent] = {}

    def send(arguments: Sequence[Any]) -> tuple[Any, Path | None]:
        own = parcel(*arguments)
        for enclosure in own.reads:
            if enclosure.is_common and enclosure.path not in common:
                common[enclosure.path] = _pack(ray, enclosure)
        reads = [common.get(enclosure.path) or _pack(ray, enclosure) for enclosure in own.reads]
        limits = {name: os.environ.get(name) for name in (LIMITED, ROOTS)}  # for where web servers redirect to
        order = pickle.dumps((function, tuple(arguments), limits))
        return task.remote(module, wanted, order, reads, own.makes, device is not None), own.makes

    return send


def _pack(ray: Any, enclosure: Enclosure) -> Sent:
    """Put what is read into the object store."""
    path, digest = enclosure.path, hashlib.sha256()
    names = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    files = []
    for name in names:
        # A file of which a part is sent ends with it.
        size = enclosure.spans[-1][1] if enclosure.spans else name.stat().st_size
        relative = "" if name == path else name.relative_to(path).as_posix()
        digest.update(f"{relative}\0{size}\0".encode())
        blocks: Blocks = []
        with name.open("rb") as file:
            for start, stop in enclosure.spans or ((0, size),):
                for place in range(start, stop, _BLOCK_BYTES):
                    file.seek(place)
                    block = file.read(min(_BLOCK_BYTES, stop - place))
                    digest.update(block if enclosure.is_common else b"")
                    blocks.append((place, ray.put(block)))
        files.append((relative, size, blocks))
    return path, digest.hexdigest() if enclosure.is_common else "", files


def _receive(ray: Any, reference: Any, folder: Path | None) -> Any:
    """Return a call's result, and write the folder that it made.

    Raises:
        ClusterError: the call was lost.
        Exception: what the call raised.
    """
    try:
        error, result, files = ray.get(reference)
    except ray.exceptions.RayError as lost:
        reason = getattr(lost, "cause", None) or next(iter(str(lost).strip().splitlines()), type(lost).__name__)
        raise ClusterError(
            f"{ADDRESS} = {os.environ[ADDRESS]}: a call was lost, and {_MAX_LOST} times again ({reason}): look at the "
            "cluster's machines (the product's version, memory, disk), and start the run again"
        ) from None
    if error is not None:
        raise error
    if folder is None:
        return result
    arriving = folder.with_name(f"{folder.name}.arriving")
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir(parents=True)
    for name, content in files:
        (arriving / name).parent.mkdir(parents=True, exist_ok=True)
        (arriving / name).write_bytes(content)
    arriving.rename(folder)
    return result
