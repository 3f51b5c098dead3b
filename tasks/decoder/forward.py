"""What the layers of a forward pass share.

Dimensions: `T` tokens of a flat batch (examples end to end), `R` columns of a head that are rotated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from tasks.decoder.attention import Attention, Segments
from tasks.decoder.delta_rule import DeltaRule
from tasks.decoder.dropout import Dropout


@dataclass(frozen=True)
class Forward:
    """What the layers of a forward pass share."""

    ops: ModuleType
    """Of the work between the products."""
    dropout: Dropout | None
    """Of the adapter."""
    attend: Attention
    delta_rule: DeltaRule
    segments: Segments
    """The examples' borders."""
    positions: Tensor
    """[T] from 0 in each example."""
    angles: Mapping[str, tuple[Tensor, Tensor]]
    """cos and sin [T, R / 2] of the positions' angles, by their kind."""
