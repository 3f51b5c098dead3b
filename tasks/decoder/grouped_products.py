"""Products of rows with the matrix of their expert."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)


def multiply_grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return each row [S, inputs] times the matrix [inputs, outputs] of its expert.

    Args:
        rows: ordered by expert.
        weights: [E, inputs, outputs]
        ends: [E] int32, where the rows of each expert end.
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        return F.grouped_mm(rows, weights, offs=ends)
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    parts = [part @ weights[expert] for expert, part in enumerate(rows.split(counts)) if len(part)]
    return torch.cat(parts) if parts else rows.new_zeros(0, weights.shape[2])
