"""Thin products of lanes (see `lanes`), in one launch for all of them where there is a GPU.

Dimensions: `K` lanes, `T` rows of all of them one lane after the other, `R` rank, `W` width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from tasks.decoder.adapters import add_product
from tasks.decoder.grouped_products import multiply_grouped


def add_thin(out: Tensor, thin: Tensor, matrices: Tensor, ends: Tensor, longest: int) -> None:
    """Add each thin row times the matrix of its lane to the output.

    Args:
        out: [T, W]
        thin: [T, R]
        matrices: [K, R, W]
        ends: [K] int32, where the rows of each lane end.
        longest: rows of the lane that has most.
    """
    kernels = find_kernels(out.device.type)
    if kernels is not None:
        kernels.add_thin(out, thin, matrices, ends, longest)
    else:
        out += multiply_grouped(thin, matrices, ends)


@dataclass
class OuterSums:
    """Gradients of one matrix of each lane: sums of outer products, added where the gradients stay."""

    firsts: tuple[int, ...]
    """First column of each lane in the thin factor."""
    ranks: tuple[int, ...]
    """Columns of each; 0: it has no such matrix."""
    scales: tuple[float, ...]
    is_turned: bool
    """The matrices are [W, rank], not [rank, W]."""
    _places: tuple[int, ...] = ()
    _tables: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def add(self, targets: Sequence[Tensor], thin: Tensor, wide: Tensor, ends: Tensor, rows: Sequence[slice]) -> None:
        """Add to the targets.

        Args:
            targets: of each lane, fp32 and contiguous.
            thin: [T, R of all lanes' layers]
            wide: [T, W]
            ends: [K] int32, where the rows of each lane end.
            rows: of each lane.
        """
        kernels = find_kernels(wide.device.type)
        if kernels is None or wide.dtype not in (torch.bfloat16, torch.float16) or targets[0].dtype != torch.float32:
            self._add_one_by_one(targets, thin, wide, rows)
            return
        places = tuple(target.data_ptr() for target in targets)
        if self._tables is None or self._places != places:
            scales = torch.tensor(self.scales, dtype=torch.float32, device=wide.device)
            self._places, self._tables = places, (kernels.tabulate(targets, self.firsts, self.ranks), scales)
        kernels.add_outer(thin, wide, ends, *self._tables, self.ranks, is_turned=self.is_turned)

    def _add_one_by_one(self, targets: Sequence[Tensor], thin: Tensor, wide: Tensor, rows: Sequence[slice]) -> None:
        lanes = zip(targets, self.firsts, self.ranks, self.scales, rows, strict=True)
        for target, first, rank, scale, lane in lanes:
            left, right = thin[lane, first : first + rank].t(), wide[lane]
            if self.is_turned:
                left, right = right.t(), left.t()
            add_product(target, left, right, scale)


@cache
def find_kernels(device: str) -> ModuleType | None:
    """Return the Triton kernels on a GPU that has Triton, else None."""
    if device != "cuda":
        return None
    try:
        from tasks.decoder import lane_kernels
    except ImportError:
        return None
    return lane_kernels
