"""The proof that a merge wrote what was planned and nothing else: the merged files against the base's, byte by byte."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from schemas.plurals import count_of
from tasks.merging.changes import MergeError
from tasks.merging.shards import PlannedTensor, read_headers
from tasks.merging.stored import StoredTensor, cut_bytes, read_block

_MAX_THREADS = 8
_NAMED = 3


@dataclass(frozen=True)
class WrittenTensors:
    """What the merged files hold."""

    num_changed: int
    """Tensors that differ from the base's, all of them planned."""
    num_kept: int
    """Tensors that are the base's byte for byte."""
    unmoved: tuple[str, ...]
    """Planned tensors that are still the base's: the change is smaller than their dtype can hold."""


def verify_tensors(plan: Sequence[PlannedTensor], folder: Path) -> WrittenTensors:
    """Compare every tensor of a merged model with the base's.

    Args:
        plan: of the merge.
        folder: of the merged model.

    Raises:
        MergeError: a tensor is missing or is none of the base's, has another dtype or shape, or one that was not
            trained differs.
    """
    written = read_headers(folder)
    odd = sorted({tensor.name for tensor in plan} ^ written.keys())
    if odd:
        raise MergeError(
            f"{folder}: {count_of(len(odd), 'tensor is', 'tensors are')} not those of the base model, such as {odd[0]}"
        )
    for tensor in plan:
        found = written[tensor.name]
        if (found.dtype, found.shape) != (tensor.source.dtype, tensor.source.shape):
            raise MergeError(
                f"{folder}: {tensor.name} is {found.dtype} {list(found.shape)}, but the base model's is "
                f"{tensor.source.dtype} {list(tensor.source.shape)}"
            )
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        same = list(pool.map(lambda tensor: _is_same(tensor.source, written[tensor.name]), plan))
    meant = [tensor.change is not None and not tensor.change.is_zero for tensor in plan]
    stray = [t.name for t, is_same, is_meant in zip(plan, same, meant, strict=True) if not is_same and not is_meant]
    if stray:
        raise MergeError(
            f"{folder}: {count_of(len(stray), 'untrained tensor differs', 'untrained tensors differ')} from the base "
            f"model's, such as {', '.join(stray[:_NAMED])}: the files are damaged: merge again"
        )
    unmoved = [t.name for t, is_same, is_meant in zip(plan, same, meant, strict=True) if is_same and is_meant]
    return WrittenTensors(same.count(False), same.count(True), tuple(unmoved))


def describe_unmoved(written: WrittenTensors) -> str:
    """Say which planned tensors are still the base's; nothing where there are none."""
    if not written.unmoved:
        return ""
    return (
        f"{len(written.unmoved)} of {len(written.unmoved) + written.num_changed} trained weights are still the base "
        f"model's after merging, such as {written.unmoved[0]}: what was learned there is smaller than its dtype holds"
    )


def _is_same(left: StoredTensor, right: StoredTensor) -> bool:
    """Compare two stored tensors' bytes, block by block."""
    with ExitStack() as stack:
        readers = [stack.enter_context(tensor.file.open("rb")).fileno() for tensor in (left, right)]
        for start, stop in cut_bytes(left):
            blocks = [read_block(reader, t, start, stop) for reader, t in zip(readers, (left, right), strict=True)]
            if not torch.equal(*blocks):
                return False
    return True
