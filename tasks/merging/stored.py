"""Tensors of a checkpoint that are still on the disk, as they lie there or packed in MXFP4, read in blocks.

Dimensions: `E` experts, `I` inputs, `O` outputs.

MXFP4 (Open Compute Project, 2023) has four bits a value, sign and size, and a power of two for each 32 of them. gpt-oss
keeps its experts' matrices [E, I, O] as blocks [E, O, I / 32, 16], two values a byte, the low half first, and scales
[E, O, I / 32], exponents plus 127. All values are exact in bf16.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tasks.merging.changes import MergeError

# Bytes of a block. Larger ones do not fit into the caches, and the allocator takes their memory anew each time.
BLOCK_BYTES = 1 << 23
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_BYTES_OF_BLOCK = 16
_VALUES_OF_BLOCK = 2 * _BYTES_OF_BLOCK
_BLOCKS, _SCALES = "_blocks", "_scales"
_PACKED_DIMS = 4


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, still on the disk."""

    file: Path
    name: str
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    begin: int
    """Of its bytes in the file."""
    num_bytes: int


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """Matrices [E, I, O] that are packed; shape, dtype and bytes are those that they have once they are unpacked."""

    blocks: StoredTensor
    scales: StoredTensor


def unpack(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors with each pair of blocks and scales as the matrices that they hold."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        whole = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        blocks, scales = stored.get(whole + _BLOCKS), stored.get(whole + _SCALES)
        if whole == name or blocks is None or scales is None or not _is_pair(blocks, scales):
            tensors[name] = tensor
            continue
        num_experts, num_out, num_blocks, _ = blocks.shape
        shape = num_experts, num_blocks * _VALUES_OF_BLOCK, num_out
        num_bytes = 2 * shape[0] * shape[1] * shape[2]
        tensors[whole] = PackedTensor(blocks.file, whole, "BF16", shape, 0, num_bytes, blocks, scales)
    return tensors


def cut_bytes(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Yield begin and end of blocks of a tensor's bytes; of packed matrices whole experts."""
    step = tensor.num_bytes // tensor.shape[0] if isinstance(tensor, PackedTensor) else BLOCK_BYTES
    for start in range(0, tensor.num_bytes, step):
        yield start, min(start + step, tensor.num_bytes)


def read_block(reader: int, source: StoredTensor, start: int, stop: int) -> Tensor:
    """Return some bytes of a stored tensor, uint8, from its file's descriptor; of packed matrices whole experts."""
    if isinstance(source, PackedTensor):
        return _read_packed(source, start, stop)
    block = torch.empty(stop - start, dtype=torch.uint8)
    _fill(reader, memoryview(block.numpy().data), source.begin + start, source)
    return block


def _is_pair(blocks: StoredTensor, scales: StoredTensor) -> bool:
    return (
        blocks.dtype == scales.dtype == "U8"
        and len(blocks.shape) == _PACKED_DIMS
        and blocks.shape[-1] == _BYTES_OF_BLOCK
        and blocks.shape[:-1] == scales.shape
    )


def _read_packed(source: PackedTensor, start: int, stop: int) -> Tensor:
    """Return the bytes, in bf16, of some experts' matrices."""
    size = source.num_bytes // source.shape[0]
    assert start % size == stop % size == 0
    parts = []
    for tensor in (source.blocks, source.scales):
        step = tensor.num_bytes // tensor.shape[0]
        with tensor.file.open("rb") as opened:
            block = read_block(opened.fileno(), tensor, start // size * step, stop // size * step)
        parts.append(block.view(-1, *tensor.shape[1:]))
    blocks, scales = parts
    table = torch.tensor([*_SIZES, *(-size for size in _SIZES)])
    halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = torch.ldexp(table[halves.int()], scales.int()[..., None] - _BIAS).flatten(-2)
    return values.mT.to(torch.bfloat16).contiguous().view(-1).view(torch.uint8)


def _fill(reader: int, view: memoryview, place: int, source: StoredTensor) -> None:
    """Read bytes of a file until the view is full."""
    done = 0
    while done < len(view):
        count = os.preadv(reader, [view[done:]], place + done)
        if not count:
            raise MergeError(f"{source.file}: {source.name} cannot be read (the file ends): fetch the model again")
        done += count
