"""Room for matrices whose columns are written by different products, and copies to and from such columns."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def make_room(like: Tensor, num_rows: int, width: int) -> Tensor:
    """Return a matrix of a tensor's dtype and device whose values are written later.

    A CPU's 16-bit products (oneDNN 3.12) read some columns beyond a view's last one and multiply them by zero: what
    lies there has to be a number.
    """
    if like.device.type == "cpu" and like.dtype in (torch.bfloat16, torch.float16):
        return like.new_zeros(num_rows, width)
    return like.new_empty(num_rows, width)


def copy_rows(source: Tensor, target: Tensor) -> None:
    """Copy a matrix [rows, width] to another of its dtype; the rows of either may lie further apart than their width.

    PyTorch's own copy of such rows takes them value by value, at a third of the memory's speed.
    """
    program = _find_program() if source.is_cuda else None
    if program is None or source.dtype != target.dtype or source.stride(1) != 1 or target.stride(1) != 1:
        target.copy_(source)
    else:
        program(source, target)


def keep_rows(source: Tensor) -> Tensor:
    """Return a copy of a matrix [rows, width] with nothing between its rows."""
    kept = source.new_empty(source.shape)
    copy_rows(source, kept)
    return kept


@cache
def _find_program() -> Callable[[Tensor, Tensor], None] | None:
    try:
        from tasks.decoder import copy_kernels
    except ImportError:
        return None
    return copy_kernels.copy_rows
