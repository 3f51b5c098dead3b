"""The parts of a tokens table that a rank needs now: fetched where they are not here, laid out, and mapped.

A part is laid out in a folder that the ranks of a machine share: the first that needs it makes it, and the last that
needed it deletes it. Each rank prepares the parts of its next steps in the background, and lets go of the others, so
that neither its memory nor the disk grows with the table.
"""

import shutil
import time
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from schemas.plurals import count_of
from tasks import storage, stored_files
from tasks.partitions import list_parts
from tasks.training.records import TrainingError
from tasks.training.table_writer import write_examples
from tasks.training.token_table import WEIGHTS, open_table

_NUM_THREADS = 2
_MOST_IDLE = 16
"""Parts that are held though nobody has prepared them."""
_ARRAYS = ("input_ids", "targets", WEIGHTS)
_MADE = "made"

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class PartSource:
    """Where the parts of a table are: in its folder, or in a store."""

    table: Path
    """train.parquet, a folder; it may lack parts, or not be there."""
    names: tuple[str, ...]
    """Of the parts, below the tokens folder."""
    listed: Mapping[str, stored_files.StoredFile]
    """What those in the store have to be."""
    address: str | None
    """Of the tokens folder in the store, or of one that machines share."""

    def take(self, number: int, place: Path) -> tuple[Path, int]:
        """Return a part's file, fetched into a folder where it is elsewhere, and the bytes that were fetched.

        Raises:
            TrainingError: it is gone, or another one.
        """
        name = self.names[number]
        path = self.table.parent / name
        if path.is_file():
            return path, 0
        if self.address is None or name not in self.listed:
            raise TrainingError(f"{path}: the part is missing: start the run again, which fetches it or makes it again")
        wanted, address = self.listed[name], f"{self.address}/{name}"
        if not stored_files.is_store(address):
            return self._compare(Path(address), wanted), 0
        try:
            content = stored_files.read_file(address, wanted)
        except stored_files.StoreError as error:
            raise TrainingError(str(error)) from error
        fetched = place / "fetched.parquet"
        fetched.write_bytes(content)
        return fetched, len(content)

    def _compare(self, path: Path, wanted: stored_files.StoredFile) -> Path:
        """Return a file of a folder that machines share, if it is what was put there."""
        try:
            is_same = path.stat().st_size == wanted.num_bytes and storage.digest_file(path) == wanted.sha256
        except OSError as error:
            raise TrainingError(f"{path} cannot be read ({error}): start the run again") from error
        if not is_same:
            raise TrainingError(f"{path} is damaged: its sha256 is not {wanted.sha256[:12]}: start the run again")
        return path


def find_parts(table: Path, num_parts: int, address: str | None) -> PartSource:
    """Return where the parts of a table are, of which some or all may be in a store.

    Raises:
        TrainingError: there are not as many as the index has.
    """
    listed = stored_files.read_list(table.parent)
    names = sorted(name for name in listed if name.startswith(f"{table.name}/"))
    if not names:
        names = [f"{table.name}/{part.name}" for part in list_parts(table)] if table.is_dir() else []
    if len(names) != num_parts:
        raise TrainingError(
            f"{table}: it has {count_of(len(names), 'part')}, and its index {num_parts}: start the run again, which "
            "makes both again"
        )
    return PartSource(table, tuple(names), listed, address)


@dataclass
class PartCounts:
    """What a rank has done to have its parts."""

    laid_out: int = 0
    fetched: int = 0
    """Of those laid out, the ones from a store."""
    fetched_bytes: int = 0
    waited_seconds: float = 0.0
    """While a part that was needed was not there yet."""
    most_at_once: int = 0
    """Parts that were held."""
    numbers: set[int] = field(default_factory=set)
    """Parts that were used."""


class TokenParts:
    """The parts of a table, by which its examples are read."""

    def __init__(
        self,
        source: PartSource,
        folder: Path,
        offsets: Numbers,
        bounds: Numbers,
        *,
        group: int,
        rank: int,
    ) -> None:
        """Begin with none.

        Args:
            source: where they are.
            folder: for those that are laid out, shared by the ranks of this machine; made when missing.
            offsets: [N + 1] of the table's examples.
            bounds: [P + 1] the examples before each part.
            group: examples that belong together.
            rank: this one's number.
        """
        self.bounds = bounds
        self.counts = PartCounts()
        self._source, self._folder, self._offsets, self._group = source, folder, offsets, group
        self._firsts: list[int] = bounds[:-1].tolist()
        self._starts: list[int] = offsets[bounds[:-1]].tolist()
        self._sign = f"used-by-{rank}"
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="token-parts")
        self._held: dict[int, Future[dict[str, Any]]] = {}
        self._wanted: dict[Hashable, list[int]] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._source.names)

    def prepare(self, user: Hashable, wanted: Sequence[int]) -> None:
        """Begin to lay out the parts that somebody needs next, in this order, and let go of those that nobody needs."""
        with self._lock:
            self._wanted[user] = list(wanted)
            if not wanted:
                del self._wanted[user]
            kept = {number for numbers in self._wanted.values() for number in numbers}
            for number in [number for number in self._held if number not in kept]:
                self._let_go(number)
            for number in wanted:
                self._hold(number)

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return tokens of one part from `start` to `stop`, counted over the whole table; waits where it has to.

        Raises:
            TrainingError: the part is gone, or damaged.
        """
        number = bisect_right(self._starts, start) - 1  # of parts without tokens the one after them
        first = self._starts[number]
        values = self._get(number).get(name)
        if values is None:  # weights, of a part in which every label weighs 1
            return np.ones(stop - start, np.float32)
        assert stop - first <= len(values), (name, start, stop)
        found: NDArray[Any] = values[start - first : stop - first]
        return found

    def read_name(self, example: int) -> str:
        """Return the id of an example."""
        number = bisect_right(self._firsts, example) - 1
        return str(self._get(number)["example_ids"][example - int(self.bounds[number])])

    def close(self) -> None:
        """Let go of all; what is needed later is laid out again."""
        with self._lock:
            self._wanted.clear()
            for number in list(self._held):
                self._let_go(number)
        self._pool.shutdown()
        if not list(self._folder.glob("*/used-by-*")):  # else another rank has some still
            shutil.rmtree(self._folder, ignore_errors=True)

    def _get(self, number: int) -> dict[str, Any]:
        with self._lock:
            if number not in self._held and len(self._held) >= _MOST_IDLE:
                kept = {each for numbers in self._wanted.values() for each in numbers}
                if (idle := next((each for each in self._held if each not in kept), None)) is not None:
                    self._let_go(idle)
            future = self._hold(number)
            self.counts.numbers.add(number)
        begin = time.perf_counter()
        try:
            return future.result()
        except CancelledError:  # somebody let go of it before it was begun
            return self._get(number)
        finally:
            self.counts.waited_seconds += time.perf_counter() - begin

    def _hold(self, number: int) -> "Future[dict[str, Any]]":
        if number not in self._held:
            self._held[number] = self._pool.submit(self._open, number)
            self.counts.most_at_once = max(self.counts.most_at_once, len(self._held))
        return self._held[number]

    def _let_go(self, number: int) -> None:
        """Forget a part; what is mapped of it stays as long as somebody has it."""
        future = self._held.pop(number)
        if not future.cancel():
            future.add_done_callback(lambda done: self._remove(number))

    def _remove(self, number: int) -> None:
        """Take this rank's sign off a part's folder, and delete it with the last one."""
        place = self._place(number)
        with storage.make_lock(place.with_suffix(".lock")):
            if number in self._held:  # needed again meanwhile
                return
            (place / self._sign).unlink(missing_ok=True)
            if not list(place.glob("used-by-*")):
                shutil.rmtree(place, ignore_errors=True)

    def _open(self, number: int) -> dict[str, Any]:
        """Map a part, which is laid out where no rank of this machine has done it yet."""
        place = self._place(number)
        self._folder.mkdir(parents=True, exist_ok=True)
        with storage.make_lock(place.with_suffix(".lock")):
            if not (place / _MADE).is_file():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
            (place / self._sign).touch()  # first: a rank that ends deletes what no rank has signed
            if not (place / _MADE).is_file():
                self._lay_out(number, place)
                (place / _MADE).touch()
            table = open_table(place, group=self._group)
        arrays = {name: values for name in _ARRAYS if (values := getattr(table, name)) is not None}
        return {**arrays, "example_ids": table.example_ids}

    def _lay_out(self, number: int, place: Path) -> None:
        """Write a part's arrays.

        Raises:
            TrainingError: it is gone, damaged, or not what the index says.
        """
        path, num_bytes = self._source.take(number, place)
        name = f"{self._source.address}/{self._source.names[number]}" if num_bytes else str(path)
        try:
            write_examples(path, place, pairs=self._group > 1)
            found = np.fromfile(place / "offsets", "<i8")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise TrainingError(f"{name} is damaged or cannot be laid out ({error}): start the run again") from error
        finally:
            (place / "fetched.parquet").unlink(missing_ok=True)
        own = self._offsets[self.bounds[number] : self.bounds[number + 1] + 1]
        if not np.array_equal(found, own - own[0]):
            raise TrainingError(
                f"{name} is not the part that the index describes (it has {len(found) - 1} examples of "
                f"{int(found[-1])} tokens, and the index {len(own) - 1} of {int(own[-1] - own[0])}): start the run "
                "again"
            )
        self.counts.laid_out += 1
        self.counts.fetched += bool(num_bytes)
        self.counts.fetched_bytes += num_bytes

    def _place(self, number: int) -> Path:
        return self._folder / f"{number:06}"


@contextmanager
def reading_parts(parts: TokenParts | None) -> Iterator[None]:
    """Let go of a table's parts at the end, where it has any."""
    try:
        yield
    finally:
        if parts is not None:
            parts.close()


def describe_parts(counts: Sequence[PartCounts], num_parts: int) -> str:
    """Say what all ranks together have done to have their parts.

    Args:
        counts: of each rank.
        num_parts: of the table.
    """
    used = set[int]().union(*(each.numbers for each in counts))
    fetched, num_bytes = sum(each.fetched for each in counts), sum(each.fetched_bytes for each in counts)
    own, held = max(len(each.numbers) for each in counts), max(each.most_at_once for each in counts)
    return (
        f"Of the {num_parts:,} parts of the tokens {len(used):,} were used, {own:,} by a rank at most, which held "
        f"{held} at a time; "
        f"{fetched:,} were fetched ({num_bytes / 1e6:,.1f} MB), and a rank waited for parts "
        f"{max(each.waited_seconds for each in counts):.1f} s at most"
    )


class PartValues:
    """An array of a table in parts, of which spans within one part are read."""

    def __init__(self, parts: TokenParts, name: str, length: int) -> None:
        self._parts, self._name, self._length = parts, name, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, span: slice) -> NDArray[Any]:
        start, stop, _ = span.indices(self._length)
        return self._parts.read(self._name, start, stop)


class PartNames:
    """The ids of a table's examples."""

    def __init__(self, parts: TokenParts) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return int(self._parts.bounds[-1])

    def __getitem__(self, example: int) -> str:
        return self._parts.read_name(int(example))
