"""Reads all shards of a run: one after the other in this process, or in worker processes."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePath

from schemas.config import DataConfig
from tasks import execution
from tasks.ingestion.intake import read_shard
from tasks.ingestion.pieces import SUMMARY_NAME, find_stored, put_away, read_summary
from tasks.ingestion.shards import SHARD_BYTES, Shard, ShardPart, join_parts, plan_parts, plan_shards
from tasks.ingestion.sources.columnar import BYTE_KINDS, WHOLE
from tasks.ingestion.sources.files import Source
from tasks.parcels import Enclosure, Parcel, list_bytes
from tasks.progress import Tell
from tasks.stored_files import list_sizes


def read_all(
    config: DataConfig,
    sources: Sequence[Sequence[Source]],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    *,
    store: str | None = None,
    tell: Tell = lambda num_done, num_all: None,
) -> list[Path]:
    """Read every shard into a folder of its own below `folder`, and return these folders in the order of the rows.

    A shard that an earlier attempt finished there is not read again. A small dataset is read in place, and so is one
    whose reading `data.max_rows` ends somewhere; others go to the workers, and `tell` is told how many are read. These
    put the rows into a store, where one is given by the address of a folder, and leave here what the index is made of.

    Raises:
        DataError: a source cannot be read; of several the first one's.
    """
    if config.max_rows is not None:
        return _read_first(config, sources, folder, shard_bytes, config.max_rows)
    shards = list(plan_shards(config, sources, shard_bytes))
    kept = {} if store is None else list_sizes(store)
    folders = [folder / name_shard(shard, number) for number, shard in enumerate(shards)]
    left = [pair for pair in zip(shards, folders, strict=True) if not _is_finished(pair[1], kept)]
    if is_small(shards, shard_bytes):
        for pair in left:
            finish_shard(*pair)
        return folders
    calls = [(*pair, None, store) for pair in left]
    execution.map(finish_shard, calls, parcel=enclose, tell=tell)
    return folders


def _is_finished(folder: Path, kept: Mapping[str, int]) -> bool:
    """Tell whether a shard was read, and its rows are where they were put; else nothing is left of it.

    Args:
        folder: of the shard.
        kept: sizes of the files in the store, by their names.
    """
    if not (folder / SUMMARY_NAME).is_file():
        return False
    numbers = range(read_summary(folder)["num_pieces"])
    notes = [find_stored(folder, name, number) for number in numbers for name in ("rows", "shingles")]
    if all(note is None or kept.get(PurePath(note.address).name) == note.file.num_bytes for note in notes):
        return True
    shutil.rmtree(folder)
    return False


def is_small(shards: Sequence[Shard], shard_bytes: int = SHARD_BYTES) -> bool:
    """Tell that all shards together are not worth a worker's start."""
    return sum(part.num_bytes for shard in shards for part in shard.parts) <= shard_bytes


def name_shard(shard: Shard, number: int) -> str:
    """Return a name for a shard's folder that another content of its files, or another way of reading, changes."""
    digest = hashlib.sha256(shard.model_dump_json().encode())
    for part in shard.parts:
        if part.file.remote is None:  # a remote file's version is in its shard
            stat = part.file.path.stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{number:06d}-{digest.hexdigest()[:16]}"


def enclose(shard: Shard, folder: Path, max_rows: int | None = None, store: str | None = None) -> Parcel:
    """Return what is read of the files of a shard, and the folder that is made."""
    paths = dict.fromkeys(part.file.path for part in shard.parts if part.file.remote is None)
    reads = [_enclose(path, [part for part in shard.parts if part.file.path == path]) for path in paths]
    return Parcel(tuple(reads), folder)


def _enclose(path: Path, parts: Sequence[ShardPart]) -> Enclosure:
    """Return what some parts of one file are read of."""
    spans = [part.span for part in parts]
    if WHOLE in spans:
        return Enclosure(path)
    first, stop, kind = spans[0].start, spans[-1].stop, parts[0].file.kind
    if kind in BYTE_KINDS:
        return Enclosure(path, spans[0]._replace(stop=stop).list_bytes(path.stat().st_size))
    match kind:
        case "parquet":
            with path.open("rb") as file:
                return Enclosure(path, list_bytes(file, first, stop))
        case _:  # nobody says where the batches of an Arrow file are: it is sent once, whole
            return Enclosure(path, is_common=True)


def finish_shard(shard: Shard, folder: Path, max_rows: int | None = None, store: str | None = None) -> int:
    """Read a shard, and give its folder the name when all of it is there; return the number of rows.

    Where there is a store, the rows are put there.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    num_rows = read_shard(shard, unfinished, max_rows, compression="uncompressed" if store is None else "zstd")
    if store is not None:
        put_away(unfinished, store)
    unfinished.rename(folder)
    return num_rows


def _read_first(
    config: DataConfig, sources: Sequence[Sequence[Source]], folder: Path, shard_bytes: int, max_rows: int
) -> list[Path]:
    """Read at most `max_rows` rows from the front of each dataset; the held-out one is read whole."""
    folders: list[Path] = []
    parts = plan_parts(config, sources, shard_bytes)
    for dataset, own in groupby(parts, key=lambda part: part.dataset):
        is_held_out = dataset == len(config.datasets)
        left = None if is_held_out else max_rows
        for shard in join_parts(own, config.screen, shard_bytes):
            if left == 0:
                break
            path = folder / name_shard(shard, len(folders))
            shutil.rmtree(path, ignore_errors=True)
            num_rows = finish_shard(shard, path, left)
            folders.append(path)
            left = None if left is None else left - num_rows
    return folders
