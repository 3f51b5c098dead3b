"""What a worker of a Ray cluster does with a call that was sent to it (see cluster.py)."""

import importlib
import os
import pickle
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from tasks import storage
from tasks.dependencies import digest_files, list_libraries
from tasks.parcels import find, unpacked

_PRELOADED = "tasks.preloading"
_NUM_SHOWN = 5

Outcome = tuple[Exception | None, Any, list[tuple[str, bytes]]]
"""What the call raised, or its result and the files of the folder that it made."""

_kept: dict[str, Path] = {}
"""What all calls read, by digest; there until this process ends."""
_life = ExitStack()


class VersionError(ValueError):
    """A worker has another version of the product, or of a library, than the one that sends calls."""


def work(
    module: str,
    wanted: Mapping[str, str],
    order: bytes,
    reads: Sequence[Any],
    makes: Path | None,
    runs_models: bool = False,
) -> Outcome:
    """Make a call.

    Args:
        module: the function's.
        wanted: fingerprint of the code and libraries there.
        order: the function, its arguments and the limits of what the run may read, as bytes: nothing of it is imported
            before the versions were compared.
        reads: what was sent with it (`cluster.Sent`).
        makes: the folder that it makes, by its path with the sender.
        runs_models: it wants torch, which what is preloaded for other calls goes without.
    """
    try:
        _compare(wanted, _fingerprint(module))
        if not runs_models:
            importlib.import_module(_PRELOADED)  # it keeps a worker to one thread, and is where all imports are
        function, arguments, limits = pickle.loads(order)
        _take_over(limits)
        with storage.new_folder() as folder, unpacked(_unpack(reads, folder) | _place(makes, folder)):
            result = function(*(find(value) if isinstance(value, Path) else value for value in arguments))
            made = sorted(path for path in (folder / "made").rglob("*") if path.is_file())
            files = [(path.relative_to(folder / "made").as_posix(), path.read_bytes()) for path in made]
    except Exception as error:
        return _as_sendable(error), None, []
    return None, result, files


@cache
def _fingerprint(module: str) -> dict[str, str]:
    return {"code": digest_files(module), **list_libraries(module)}


def _compare(wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse other code or libraries: their results could be others.

    Raises:
        VersionError: says where, and what differs.
    """
    differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if not differing:
        return
    shown = [
        f"{name} {found.get(name, 'absent')[:12]} there and {wanted.get(name, 'absent')[:12]} here"
        for name in differing[:_NUM_SHOWN]
    ]
    more = f" and {len(differing) - _NUM_SHOWN} more" if len(differing) > _NUM_SHOWN else ""
    raise VersionError(
        f"a worker on {socket.gethostname()} has another version of the product than this machine: {', '.join(shown)}"
        f"{more}: install the same one there, and start Ray there again"
    )


def _take_over(limits: Mapping[str, str | None]) -> None:
    """Set the environment's limits to those of the one that sends the call."""
    for name, value in limits.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _place(makes: Path | None, folder: Path) -> dict[Path, Path]:
    return {} if makes is None else {makes: folder / "made"}


def _unpack(reads: Sequence[Any], folder: Path) -> dict[Path, Path]:
    """Write what was sent, and return its places by its paths with the sender."""
    places: dict[Path, Path] = {}
    for number, (path, digest, files) in enumerate(reads):
        if digest and digest in _kept:
            places[path] = _kept[digest]
            continue
        base = _life.enter_context(storage.new_folder()) if digest else folder
        place = base / f"read-{number}" / path.name
        for name, size, blocks in files:
            _write(place / name if name else place, size, blocks)
        places[path] = place
        if digest:
            _kept[digest] = place
    return places


def _write(path: Path, size: int, blocks: Sequence[tuple[int, Any]]) -> None:
    """Write a file of this size, of which these blocks are there."""
    import ray

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
        for start, block in blocks:
            file.seek(start)
            file.write(ray.get(block))


def _as_sendable(error: Exception) -> Exception:
    """Return an error that can be sent: itself, or its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
