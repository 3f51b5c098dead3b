"""Inputs that each layer has of its own, made of a token's id and of its embedding (Gemma 4).

Dimensions: `T` tokens, `H` hidden size, `L` layers, `P` size of a layer's input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder.blocks import Project
from tasks.decoder.dropout import Dropout
from tasks.decoder.norms import Norm
from tasks.decoder.projections import AnyProjection


@dataclass(frozen=True)
class LayerInputs:
    """What makes the layers' own inputs."""

    embed: Callable[[Tensor], Tensor]
    """[T] -> [T, L * P]"""
    projection: AnyProjection
    """H -> L * P"""
    projection_scale: float
    norm: Norm
    """Of the P columns of a layer."""
    scale: float
    """Of the sum of both."""

    def compute(self, input_ids: Tensor, embedded: Tensor, ops: ModuleType, dropout: Dropout | None) -> list[Tensor]:
        """Return L inputs [T, P] of tokens [T] and their embeddings [T, H]."""
        parameters = self.projection.adapters.parameters
        projected = Project.apply(embedded, self.projection, ops, dropout, *parameters) * self.projection_scale
        size = len(self.norm.weight)
        projected = projected.unflatten(-1, (-1, size))
        normed = F.rms_norm(projected, (size,), self.norm.weight.to(projected.dtype), self.norm.eps)
        return list(((normed + self.embed(input_ids).view_as(normed)) * self.scale).unbind(1))
