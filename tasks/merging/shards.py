"""Safetensors files read and written in blocks of rows, so that memory does not grow with a tensor or a file.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length N, little-endian; N bytes of JSON
that gives each tensor's dtype, shape and place; then the tensors' bytes, without gaps. Every place is known before the
first value is, so blocks are computed and written by several threads, in any order. Files are read, not mapped: pages
of a mapped file would count as this process's memory.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tasks.merging.changes import MergeError
from tasks.merging.joined import StoredChange
from tasks.merging.stored import BLOCK_BYTES, StoredTensor, read_block

INDEX = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_THREADS = 8


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged model: where it comes from and what happens to it."""

    name: str
    source: StoredTensor
    change: StoredChange | None


def read_headers(model: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint in the order of its files, without reading their values.

    Raises:
        MergeError: no safetensors weights, or a file is missing or damaged.
    """
    files = [model / "model.safetensors"]
    if not files[0].exists():
        if not (model / INDEX).exists():
            raise MergeError(f"{model}: neither model.safetensors nor {INDEX}: weights as safetensors are wanted")
        weight_map: dict[str, str] = json.loads((model / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [model / name for name in sorted(set(weight_map.values()))]
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # checks the header against itself and the file's length
                start, entries = _read_header(file)
        except Exception as error:
            raise MergeError(f"{file}: cannot be read ({error}): fetch the model again") from error
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            stored[name] = StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
    return stored


def write_shards(plan: Sequence[PlannedTensor], folder: Path, limit: int) -> None:
    """Write the tensors in files of at most `limit` bytes each, and the index when there are several.

    The system may still hold bytes that are not on the disk: `storage.sync_folder` waits for them.

    Raises:
        MergeError: a file cannot be read, or a merged weight is not finite.
    """
    shards = _divide(plan, limit)
    alone = len(shards) == 1
    names = [
        "model.safetensors" if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    with _single_threaded_products(), ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for shard, name in zip(shards, names, strict=True):
            _write_shard(shard, folder / name, pool)
    if not alone:
        weight_map = {t.name: name for shard, name in zip(shards, names, strict=True) for t in shard}
        total = sum(tensor.source.num_bytes for tensor in plan)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where a file's values begin, and each tensor's entry."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries: dict[str, Any] = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    return 8 + length, entries


def _divide(plan: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Fill file after file; within one, the widest dtypes come first, so that every tensor is aligned."""
    shards: list[list[PlannedTensor]] = [[]]
    num_bytes = 0
    for tensor in plan:
        if shards[-1] and num_bytes + tensor.source.num_bytes > limit:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += tensor.source.num_bytes
    return [sorted(shard, key=lambda tensor: -_width(tensor.source)) for shard in shards]


def _width(tensor: StoredTensor) -> float:
    """Return the bytes of a value."""
    return tensor.num_bytes / max(1, torch.Size(tensor.shape).numel())


def _write_shard(shard: Sequence[PlannedTensor], path: Path, pool: ThreadPoolExecutor) -> None:
    """Write one file, all of its blocks in the pool's threads; the first error ends it."""
    header, begins = _lay_out(shard)
    with ExitStack() as stack:
        target = stack.enter_context(path.open("wb"))
        target.write(header)
        target.flush()
        files = {tensor.source.file for tensor in shard}
        sources = {file: stack.enter_context(file.open("rb")).fileno() for file in files}
        blocks: list[Future[None]] = []
        try:
            for tensor, begin in zip(shard, begins, strict=True):
                for rows in _cut(tensor):
                    work = partial(_write_block, tensor, rows, sources[tensor.source.file], target.fileno(), begin)
                    blocks.append(pool.submit(work))
            wait(blocks, return_when=FIRST_EXCEPTION)
        finally:
            for block in blocks:
                block.cancel()
            wait(blocks)  # no thread may use the files once they are closed
        for block in blocks:
            if not block.cancelled():
                block.result()


def _lay_out(shard: Sequence[PlannedTensor]) -> tuple[bytes, list[int]]:
    """Return a file's header, and where each tensor begins in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    offsets = []
    for tensor in shard:
        source = tensor.source
        end = offset + source.num_bytes
        entries[tensor.name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [offset, end]}
        offsets.append(offset)
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + offset for offset in offsets]


def _cut(tensor: PlannedTensor) -> Iterator[slice]:
    """Yield the rows of each block; a tensor without dimensions is one row, one without values none."""
    source = tensor.source
    num_rows = source.shape[0] if source.shape else 1
    if source.num_bytes:
        step = max(1, BLOCK_BYTES * num_rows // source.num_bytes)
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))


def _write_block(tensor: PlannedTensor, rows: slice, reader: int, writer: int, begin: int) -> None:
    """Read some rows of a tensor, change them, and write them to their place.

    Raises:
        MergeError: the file ends too early, or the result is not finite.
    """
    source = tensor.source
    num_rows = source.shape[0] if source.shape else 1
    start, stop = (source.num_bytes * row // num_rows for row in (rows.start, rows.stop))
    block = read_block(reader, source, start, stop)
    if tensor.change is not None:
        shape = (rows.stop - rows.start, *source.shape[1:]) if source.shape else ()
        merged = tensor.change.apply(block.view(FLOATS[source.dtype]).view(shape), rows)
        if not all(bool(value.isfinite()) for value in torch.aminmax(merged)):  # both carry NaN on
            raise MergeError(f"{tensor.name}: NaN or infinity after merging into {merged.dtype}: the training diverged")
        block = merged.contiguous().view(-1).view(torch.uint8)
    view = memoryview(block.numpy().data)
    done = 0
    while done < len(view):
        done += os.pwrite(writer, view[done:], begin + start + done)
    if sys.platform == "linux":
        # Begins to write to the disk now (mm/fadvise.c), while other blocks are computed, instead of all at the end.
        os.posix_fadvise(writer, begin + start, len(view), os.POSIX_FADV_DONTNEED)


@contextmanager
def _single_threaded_products() -> Iterator[None]:
    """Let every thread compute alone: they are as many as there is work for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
