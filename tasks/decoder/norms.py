"""RMS norms of the decoder, frozen or trained.

Dimensions: `T` tokens, `H` width of what is normed.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from tasks.decoder.weights import TrainedWeights


@dataclass(frozen=True)
class Norm:
    """An RMS norm."""

    weight: Tensor
    """[H] fp32, the factor itself (Gemma's modules store it less one)."""
    eps: float
    source: Tensor | None = None
    """[H]: what the weight is made of, where that is trained."""
    slope: float = 1.0
    """Of the weight in its source."""
    weights: TrainedWeights | None = None
    """Of the decoder, where its own are trained."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What is trained now."""
        return () if self.source is None or not self.source.requires_grad else (self.source,)

    def compute_grads(self, ops: ModuleType, grad: Tensor, total: Tensor, rstd: Tensor) -> list[Tensor | None]:
        """Return the gradients of `parameters`; None where they were added in place.

        Args:
            ops: `elementwise` or `kernels`.
            grad: of the norm's output [T, H].
            total: what was normed [T, H].
            rstd: [T], 1 / sqrt(mean square + eps).
        """
        return [self.give(ops.sum_normed(grad, total, rstd))] if self.parameters else []

    def give(self, grad: Tensor) -> Tensor | None:
        """Pass the gradient of the weight on to its source; see `TrainedWeights.give`."""
        assert self.source is not None
        assert self.weights is not None
        return self.weights.give(self.source, grad * self.slope)


def list_parameters(*norms: Norm | None) -> tuple[Tensor, ...]:
    """Return what is trained of some norms."""
    return tuple(parameter for norm in norms if norm is not None for parameter in norm.parameters)
