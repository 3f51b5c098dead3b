"""Tensors of a checkpoint that are still on the disk, as they lie there or packed in MXFP4 or FP8, read in blocks.

Dimensions: `E` experts, `I` inputs, `O` outputs.

MXFP4 (Open Compute Project, 2023) has four bits a value, sign and size, and a power of two for each 32 of them. gpt-oss
keeps its experts' matrices [E, I, O] as blocks [E, O, I / 32, 16], two values a byte, the low half first, and scales
[E, O, I / 32], exponents plus 127. All values are exact in bf16.

FP8 (DeepSeek-V3 technical report, 2024, section 3.3) keeps a matrix [O, I] in 8 bits a value, and a factor for each
block of 128 x 128 values, or one for all. Their products are rounded to bf16, as transformers does.
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
_FP8, _FACTORS, _INPUT_FACTOR = "F8_E4M3", "_scale_inv", "activation_scale"
_FACTOR_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


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
    """Matrices [E, I, O] in MXFP4, or one [O, I] in FP8; shape, dtype and bytes are those that they have unpacked."""

    blocks: StoredTensor
    """The values in 4 or 8 bits."""
    scales: StoredTensor


def unpack(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors with each pair of values and scales as the matrices that they hold."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if (scaled := _find_scaled(name, stored)) is not None:
            if scaled.name == name:
                tensors[name] = scaled
            continue
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
    """Yield begin and end of blocks of a tensor's bytes; of packed matrices whole experts, or whole rows."""
    step = BLOCK_BYTES
    if isinstance(tensor, PackedTensor):
        row = tensor.num_bytes // tensor.shape[0]
        step = max(1, BLOCK_BYTES // row) * row
    for start in range(0, tensor.num_bytes, step):
        yield start, min(start + step, tensor.num_bytes)


def read_block(reader: int, source: StoredTensor, start: int, stop: int) -> Tensor:
    """Return some bytes of a stored tensor, uint8, from its file's descriptor; of packed ones whole experts or rows."""
    if isinstance(source, PackedTensor):
        read = _read_scaled if source.blocks.dtype == _FP8 else _read_packed
        return read(source, start, stop)
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


def _find_scaled(name: str, stored: Mapping[str, StoredTensor]) -> PackedTensor | None:
    """Return the matrix in FP8 that a stored tensor holds or belongs to; None where it is of none."""
    whole = name.removesuffix(_FACTORS)
    if name.endswith(f".{_INPUT_FACTOR}"):
        whole = f"{name.removesuffix(_INPUT_FACTOR)}weight"
    values, scales = stored.get(whole), stored.get(whole + _FACTORS)
    if values is None or scales is None or values.dtype != _FP8 or scales.dtype not in _FACTOR_DTYPES:
        return None
    sides = scales.shape if len(scales.shape) == len(values.shape) else (1, 1)
    is_one = len(sides) == len(scales.shape) or scales.shape in ((), (1,))
    if len(values.shape) != len(sides) or not is_one or any(v % f for v, f in zip(values.shape, sides, strict=True)):
        return None
    return PackedTensor(values.file, whole, "BF16", values.shape, 0, 2 * values.num_bytes, values, scales)


def _read_scaled(source: PackedTensor, start: int, stop: int) -> Tensor:
    """Return the bytes, in bf16, of some rows of a matrix in FP8."""
    num_rows, width = source.shape
    first, last = start // (2 * width), stop // (2 * width)
    assert start % (2 * width) == stop % (2 * width) == 0
    with source.blocks.file.open("rb") as opened:
        block = read_block(opened.fileno(), source.blocks, first * width, last * width)
    with source.scales.file.open("rb") as opened:
        found = read_block(opened.fileno(), source.scales, 0, source.scales.num_bytes)
    factors = found.view(_FACTOR_DTYPES[source.scales.dtype]).float()
    grid = factors.view(source.scales.shape if len(source.scales.shape) == len(source.shape) else (1, 1))
    rows = torch.arange(first, last) // (num_rows // grid.shape[0])
    values = block.view(torch.float8_e4m3fn).view(-1, width).float()
    values *= grid[rows].repeat_interleave(width // grid.shape[1], dim=1)
    return values.to(torch.bfloat16).view(-1).view(torch.uint8)


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
