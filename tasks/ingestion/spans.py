"""Divides files into spans that can be read apart: lines, elements of a list, rows of CSV, row groups, record batches.

A remote file is not read for it, but where it is larger than a shard: workers count the lines of JSONL, and JSON lists
and CSV are looked through here, a block at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from tasks import execution
from tasks.ingestion.sources import stores
from tasks.ingestion.sources.columnar import FileSpan
from tasks.ingestion.sources.files import SourceFile
from tasks.ingestion.sources.json_files import begins_list
from tasks.ingestion.sources.json_lists import READ_BYTES as LIST_BYTES
from tasks.ingestion.sources.remote import read_range, survey_lines
from tasks.ingestion.sources.remote_files import RemoteFile
from tasks.ingestion.sources.separators import Start, find_csv_starts, find_list_starts
from tasks.parcels import Parcel

READ_BYTES = 1 << 20
_SCANNED_BYTES = 4 << 20

Spans = list[tuple[FileSpan, int]]
"""Each with its bytes."""
Survey = Sequence[tuple[int, int | None]]
"""Of each part of a file the number of line feeds, and the place of the first one."""


def divide(file: SourceFile, shard_bytes: int, surveys: Mapping[RemoteFile, Survey] = MappingProxyType({})) -> Spans:
    """Return the spans of a file, of about so many bytes each; few or none where it is not divided.

    Args:
        file: to be divided.
        shard_bytes: wanted of a span.
        surveys: of remote files whose lines were counted already (`survey_all`).
    """
    if file.num_bytes <= shard_bytes:
        return []
    if file.remote is None:
        of_files = _OF_FILES.get(file.kind)
        return of_files(file.path, shard_bytes) if of_files else []
    if _is_surveyed(file, shard_bytes):
        survey = surveys.get(file.remote) or survey_all([file], shard_bytes)[file.remote]
        return _divide_remote_lines(file.remote, shard_bytes, survey)
    of_remote_files = _OF_REMOTE_FILES.get(file.kind) if file.remote.has_ranges else None
    return of_remote_files(file.remote, shard_bytes) if of_remote_files else []


def survey_all(files: Iterable[SourceFile], shard_bytes: int) -> dict[RemoteFile, Survey]:
    """Have workers count the lines of the parts of all remote JSONL files that are divided, none waiting for another.

    Raises:
        DataError: a file cannot be read; of several the first one's.
    """
    remotes = [file.remote for file in files if file.remote is not None and _is_surveyed(file, shard_bytes)]
    calls = [(remote, *bounds) for remote in remotes for bounds in pairwise(_place_parts(remote, shard_bytes))]
    found = iter(execution.map(survey_lines, calls, parcel=lambda *_: Parcel(())) if calls else ())
    return {remote: [next(found) for _ in _place_parts(remote, shard_bytes)[1:]] for remote in remotes}


def _is_surveyed(file: SourceFile, shard_bytes: int) -> bool:
    """Tell whether a file's lines are counted by workers."""
    return file.remote is not None and file.remote.has_ranges and file.kind == "jsonl" and file.num_bytes > shard_bytes


def _place_parts(remote: RemoteFile, shard_bytes: int) -> list[int]:
    """Return where the parts of a remote JSONL file begin, and where the last one ends."""
    assert remote.size is not None, remote
    num_parts = -(-remote.size // shard_bytes)
    # A part begins behind the first line feed from the byte before its place on.
    return [0, *(max(0, remote.size * number // num_parts - 1) for number in range(1, num_parts)), remote.size]


def _divide_remote_lines(remote: RemoteFile, shard_bytes: int, survey: Survey) -> Spans:
    """Divide a remote JSONL file as `_divide_lines` does: each part ends with the line that a byte of it is in."""
    assert remote.size is not None, remote
    starts, num_feeds = [(0, 1)], 0
    for place, (number, first) in zip(_place_parts(remote, shard_bytes), survey, strict=False):
        # A part without a line feed lies within a line, which began in an earlier one.
        if place and first is not None and first + 1 < remote.size:
            starts.append((first + 1, num_feeds + 2))
        num_feeds += number
    stops = [*(start for start, _ in starts[1:]), remote.size]
    return [(FileSpan(start, stop, row), stop - start) for (start, row), stop in zip(starts, stops, strict=True)]


def _divide_remote_row_groups(remote: RemoteFile, shard_bytes: int) -> Spans:
    if remote.address.startswith("http"):  # its footer cannot be read apart
        return []
    with stores.open_file(remote) as file:
        return _divide_row_groups(file, shard_bytes)


def _divide_lines(path: Path, shard_bytes: int) -> Spans:
    """Divide a JSONL file into equal parts that end with a line, and count the lines before each."""
    size = path.stat().st_size
    num_parts = -(-size // shard_bytes)
    spans: Spans = []
    start, first_row = 0, 1
    with path.open("rb") as handle:
        for number in range(1, num_parts + 1):
            if start >= size:
                break
            stop = size
            if number < num_parts:
                handle.seek(max(start, size * number // num_parts - 1))
                handle.readline()
                stop = handle.tell()
            handle.seek(start)
            spans.append((FileSpan(start, stop, first_row), stop - start))
            first_row += _count_lines(handle, stop - start)
            start = stop
    return spans


def _count_lines(handle: Any, num_bytes: int) -> int:
    """Count the line feeds in the next bytes."""
    count = 0
    while num_bytes > 0 and (block := handle.read(min(num_bytes, READ_BYTES))):
        count += block.count(b"\n")
        num_bytes -= len(block)
    return count


def _divide_row_groups(table: Path | BinaryIO, shard_bytes: int) -> Spans:
    """Divide a Parquet file between row groups."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        metadata = pq.read_metadata(table)
    except (pa.ArrowException, OSError):
        return []  # the reader says what is wrong with it
    groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
    return _join_spans([(group.num_rows, group.total_byte_size) for group in groups], shard_bytes)


def _divide_batches(path: Path, shard_bytes: int) -> Spans:
    """Divide an Arrow file between record batches; a stream is not divided."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as memory:
            file = pa.ipc.open_file(memory)
            batches = (file.get_batch(place) for place in range(file.num_record_batches))
            return _join_spans([(batch.num_rows, batch.nbytes) for batch in batches], shard_bytes)
    except (pa.ArrowException, OSError):
        return []


def _join_spans(pieces: Sequence[tuple[int, int]], shard_bytes: int) -> Spans:
    """Put neighbouring pieces (their rows and bytes) together until they fill a shard."""
    spans: Spans = []
    start, first_row, rows, size = 0, 1, 0, 0
    for place, (num_rows, num_bytes) in enumerate(pieces):
        if size and size + num_bytes > shard_bytes:
            spans.append((FileSpan(start, place, first_row), size))
            start, first_row, rows, size = place, first_row + rows, 0, 0
        rows, size = rows + num_rows, size + num_bytes
    return [*spans, (FileSpan(start, len(pieces), first_row), size)]


def _read_file(path: Path) -> tuple[int, Iterator[bytes]]:
    """Return a file's size, and its blocks."""

    def read() -> Iterator[bytes]:
        with path.open("rb") as handle:
            while block := handle.read(_SCANNED_BYTES):
                yield block

    return path.stat().st_size, read()


def _read_remote(remote: RemoteFile) -> tuple[int, Iterator[bytes]]:
    assert remote.size is not None, remote
    return remote.size, read_range(remote, 0, remote.size)


def _divide_list(file: tuple[int, Iterator[bytes]], shard_bytes: int) -> Spans:
    """Divide a JSON list between its elements; what is no list is not divided."""
    size, blocks = file
    head = next(blocks, b"")
    if not begins_list(head[:LIST_BYTES]):
        return []
    return _cut_at(find_list_starts(chain([head], blocks), _set_targets(size, shard_bytes), size), size)


def _divide_csv(file: tuple[int, Iterator[bytes]], shard_bytes: int, delimiter: str) -> Spans:
    """Divide a CSV file between rows that do not share a line."""
    size, blocks = file
    return _cut_at(find_csv_starts(blocks, _set_targets(size, shard_bytes), size, delimiter), size)


def _set_targets(size: int, shard_bytes: int) -> list[int]:
    num_parts = -(-size // shard_bytes)
    return [size * number // num_parts for number in range(1, num_parts)]


def _cut_at(starts: Sequence[Start], size: int) -> Spans:
    """Return the spans between the starts, the front of the file and its end."""
    fronts = [Start(0, 1, 1, 1), *starts]
    stops = [start.place for start in starts]
    return [
        (FileSpan(front.place, stop, *front[1:]), (size if stop is None else stop) - front.place)
        for front, stop in zip(fronts, [*stops, None], strict=True)
    ]


_Divide = Callable[[Any, int], Spans]
_SCANNED: dict[str, _Divide] = {
    "json": _divide_list,
    "csv": partial(_divide_csv, delimiter=","),
    "tsv": partial(_divide_csv, delimiter="\t"),
}


def _scan(read: Callable[[Any], tuple[int, Iterator[bytes]]], kind: str) -> _Divide:
    return lambda file, shard_bytes: _SCANNED[kind](read(file), shard_bytes)


_OF_FILES: dict[str, _Divide] = {
    "jsonl": _divide_lines,
    "parquet": _divide_row_groups,
    "arrow": _divide_batches,
    **{kind: _scan(_read_file, kind) for kind in _SCANNED},
}
_OF_REMOTE_FILES: dict[str, _Divide] = {
    "parquet": _divide_remote_row_groups,
    **{kind: _scan(_read_remote, kind) for kind in _SCANNED},
}
