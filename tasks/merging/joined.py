"""Changes of a stored tensor that holds several weights of the model, each in some of its rows.

Some checkpoints keep queries, keys and values, or gate and up projection, in one tensor, its rows one after the other
or in turn (HRM-text, Molmo 2, Inkling); transformers takes them apart while it loads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import core_model_loading as loading

from tasks.merging.changes import Change


@dataclass(frozen=True)
class RowsChange:
    """The change of one weight, and where its rows lie in the stored tensor."""

    change: Change
    places: Tensor
    """[n] of each row of the weight, along `dim` of the stored tensor."""
    dim: int
    """0; or 1 of a tensor that holds a matrix for each expert."""


@dataclass(frozen=True)
class Joined:
    """The changes of a stored tensor's weights; rows of others stay as they are."""

    parts: tuple[RowsChange, ...]

    @property
    def is_zero(self) -> bool:
        """Say whether nothing changes."""
        return all(part.change.is_zero for part in self.parts)

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        """Change some rows, or some experts, of the stored tensor."""
        changed = weight.clone()
        for part in self.parts:
            if part.dim:
                changed[:, part.places] = part.change.apply(weight[:, part.places], rows)
                continue
            (own,) = torch.where((part.places >= rows.start) & (part.places < rows.stop))
            if len(own):
                here = part.places[own] - rows.start
                changed[here] = part.change.apply(weight[here], own)
        return changed

    def join(self, other: "Joined") -> "Joined":
        """Return both changes of one tensor."""
        return Joined((*self.parts, *other.parts))


StoredChange = Change | Joined
"""Of a stored tensor."""


def find_dim(operations: Sequence[Any]) -> int | None:
    """Return the dimension along which rules take a stored tensor apart or sort its rows; None where they do not."""
    kinds = [type(operation) for operation in operations]
    takes_apart = kinds[-1:] in ([loading.Chunk], [loading.Split])
    sorts = kinds[:1] == [loading.Interleave] and not operations[0].inverse
    dims = {getattr(operation, "dim", None) for operation in operations}
    if len(kinds) != takes_apart + sorts or dims not in ({0}, {1}):
        return None
    return 0 if dims == {0} else 1


def find_places(operations: Sequence[Any], num_rows: int, first: int, size: int) -> Tensor:
    """Return where the rows of a weight lie in the stored tensor.

    Args:
        operations: of which `find_dim` has said the dimension.
        num_rows: of the stored tensor.
        first: row of the weight, once the stored rows are sorted.
        size: number of its rows.
    """
    places = torch.arange(first, first + size)
    if type(operations[0]) is loading.Interleave:  # even rows come first, then the odd ones
        half = num_rows // 2
        places = 2 * (places % half) + places // half
    return places
