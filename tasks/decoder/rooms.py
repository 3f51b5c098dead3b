"""Room for matrices whose columns are written by different products."""

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
