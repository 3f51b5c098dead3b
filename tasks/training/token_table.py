"""Examples and packs on disk, as training maps them into memory: what is not read takes none.

A folder of plain little-endian arrays: `input_ids` and `targets` (int32, the examples end to end), `offsets` (int64,
where each example begins, and where the last one ends), `packs` (int64, the examples of pack after pack) and `bounds`
(int64, where each pack begins in them), `weights` (float32, of the targets, where the tokens table has any); and
`example_ids.arrow`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.order import RowParts

WEIGHTS = "weights"
"""The column of a tokens table, where it has one: a list of floats for each example, of its labels."""
_ROWS_AT_ONCE = 4096
TYPES = {"input_ids": "<i4", "targets": "<i4", "offsets": "<i8", "packs": "<i8", "bounds": "<i8", "weights": "<f4"}

Ids = NDArray[np.int32]
Numbers = NDArray[np.int64]


class Names(Sequence[str]):
    """Texts in a file."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return str(self._values[int(index)].as_py())


class Packs(Sequence[list[int]]):
    """The examples of each pack, by number."""

    def __init__(self, order: Numbers, bounds: Numbers, parts: RowParts | None = None) -> None:
        self.parts = parts
        """Of a table that is gone through in windows of parts."""
        self._order = order
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._order[self._bounds[number] : self._bounds[number + 1]].tolist()


@dataclass(frozen=True)
class TokenTable:
    """All examples of a split, end to end: example i is at offsets[i]:offsets[i + 1]."""

    example_ids: Sequence[str]
    offsets: Numbers
    """[N + 1]"""
    input_ids: Ids
    """[sum of T]"""
    targets: Ids
    """[sum of T]; the token that each position has to predict: the labels, one to the left; IGNORE_INDEX where none."""
    weights: NDArray[np.float32] | None = None
    """[sum of T], of the targets, 0 to 1; none where each weighs 1."""
    group: int = 1
    """Examples that go through the model together: 2 where they are pairs, the chosen and the rejected in turn."""
    reference: NDArray[np.float32] | None = None
    """[N] log-probability that the model the training began as gives each answer, where an objective wants it."""
    index: "TableIndex | None" = None
    """What is known of the examples without their tokens, where these are in parts that are read when needed."""
    parts: Any = None
    """The `token_parts.TokenParts` that names and tokens are read from: spans of one example at a time."""
    head: "TokenTable | None" = None
    """The first examples, the same on every rank, where the tokens are in parts."""

    @cached_property
    def lengths(self) -> Numbers:
        """Tokens of each example, [N]."""
        return np.diff(self.offsets)

    @cached_property
    def group_lengths(self) -> Numbers:
        """Tokens of each group of examples."""
        lengths: Numbers = self.lengths.reshape(-1, self.group).sum(axis=1)
        return lengths

    @cached_property
    def trained(self) -> NDArray[Any]:
        """Positions of each example that have something to predict, [N]."""
        return count_targets(self.targets, self.offsets[1:]) if self.index is None else self.index.trained

    @cached_property
    def total_weights(self) -> NDArray[np.float64]:
        """Sum of the weights of these positions, [N]."""
        if self.index is not None:
            return self.index.total_weights
        assert self.weights is not None
        counted = np.where(self.targets != IGNORE_INDEX, self.weights, np.float32(0)).astype(np.float64)
        return np.add.reduceat(counted, self.offsets[:-1]) if len(counted) else counted

    def find_highest(self) -> tuple[int, int]:
        """Return the highest token id, and the example that has it."""
        if self.index is not None:
            example = int(self.index.highest.argmax())
            return int(self.index.highest[example]), example
        place = int(self.input_ids.argmax())
        return int(self.input_ids[place]), int(np.searchsorted(self.offsets, place, side="right")) - 1

    def list_groups(self, groups: Numbers) -> Numbers:
        """Return the examples of groups, in order."""
        examples: Numbers = (groups[:, None] * self.group + np.arange(self.group)).ravel()
        return examples


@dataclass(frozen=True)
class TableIndex:
    """What is known of a table's examples without their tokens."""

    trained: NDArray[np.int32]
    """[N] positions that have something to predict."""
    highest: NDArray[np.int32]
    """[N] the highest token id."""
    total_weights: NDArray[np.float64]
    """[N] sum of the weights of the trained positions."""


def open_table(folder: Path, *, group: int = 1) -> TokenTable:
    """Map examples into memory, of which so many belong together; their files may be deleted then."""
    names = pa.ipc.open_file(pa.memory_map(str(folder / "example_ids.arrow"))).read_all()["example_id"]
    offsets, input_ids, targets = (_open(folder, name) for name in ("offsets", "input_ids", "targets"))
    weights = _open(folder, WEIGHTS) if (folder / WEIGHTS).exists() else None
    return TokenTable(Names(names), offsets, input_ids, targets, weights, group)


def open_packs(folder: Path, parts: RowParts | None = None) -> Packs:
    """Map packs into memory; their files may be deleted then."""
    return Packs(_open(folder, "packs"), _open(folder, "bounds"), parts)


def count_targets(targets: Ids, ends: Numbers) -> Numbers:
    """Return how many positions of each example have something to predict."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(targets != IGNORE_INDEX)])
    return np.diff(before[ends], prepend=0)


def _open(folder: Path, name: str) -> NDArray[Any]:
    return open_array(folder, name, TYPES[name])


def open_array(folder: Path, name: str, kind: str) -> NDArray[Any]:
    """Map an array into memory; nothing cannot be mapped."""
    path = folder / name
    if not path.stat().st_size:
        return np.zeros(0, kind)
    return np.memmap(path, kind, mode="r")


def cut_by_length(table: TokenTable) -> Iterator[list[list[int]]]:
    """Give all examples, each group a row, some thousands at a time, the longest first."""
    order = np.argsort(-table.group_lengths, kind="stable")
    for start in range(0, len(order), _ROWS_AT_ONCE):
        rows = table.list_groups(order[start : start + _ROWS_AT_ONCE])
        yield rows.reshape(-1, table.group).tolist()
