"""Working copies of trained weights that exist for two layers at a time.

Products in 16 bits read copies of the fp32 weights. Kept for all layers they take two bytes a value. Here they are made
anew whenever a layer is computed, in one of two slots, while the layer before it is computed: twice a pass, for which
4 + 2 bytes a value are moved each time. What is computed is the same, bit by bit.
"""

from torch import Tensor

from tasks.decoder.decoder import Decoder
from tasks.decoder.divided import DividedLayers, LayerPart
from tasks.decoder.frozen_matrices import BOTH, Matrix
from tasks.decoder.layer import Layer
from tasks.decoder.projections import AnyProjection, Projection
from tasks.decoder.weights import TrainedWeights, WeightGroup, WorkingCopy

PASSING = "16-bit copies of two layers at a time"


class PassingCopies(DividedLayers):
    """The layers of a decoder whose own weights are trained."""

    def describe(self) -> str:
        """Say what lies where."""
        return PASSING

    def take_copies(self, layer: Layer, weights: TrainedWeights) -> None:
        """Have the next layer's copies made when they are wanted, and let go of those that there are.

        Args:
            layer: some of whose weights may be frozen; their products keep the matrices that they have.
            weights: of the decoder; it no longer keeps the copies up to date.
        """
        matrices = []
        for projection in layer.projections:
            copies = _find_copies(projection, weights)
            if copies:
                assert isinstance(projection, Projection)
                matrices.append(_offer(projection, copies))
                weights.copies = [copy for copy in weights.copies if not any(copy is known for known in copies)]
        self.add_layer({BOTH: matrices} if matrices else {})

    def _collect(self, part: LayerPart, room: Tensor) -> None:
        """Nothing is gathered: the matrices are written into the room."""


def pass_copies(decoder: Decoder) -> PassingCopies | None:
    """Let go of the copies of a decoder's weights, and return what makes them for each layer; None where it has none.

    Args:
        decoder: of which all layers are on one device; use it with what is returned only (`Decoder.divided`).
    """
    if decoder.weights is None or not any(
        _find_copies(p, decoder.weights) for x in decoder.layers for p in x.projections
    ):
        return None
    passing = PassingCopies(decoder.weights.parameters[0].device)
    for layer in decoder.layers:
        passing.take_copies(layer, decoder.weights)
    passing.finish()
    return passing


def _find_copies(projection: AnyProjection, weights: TrainedWeights) -> list[WorkingCopy]:
    """Return the copies that make up a projection's whole matrix; none where some of it is frozen."""
    group = projection.adapters
    if not isinstance(projection, Projection) or not isinstance(group, WeightGroup):
        return []
    owned = {id(part.module.weight) for part in group.parts}
    found = [copy for copy in weights.copies if id(copy.parameter) in owned]
    return found if len(found) == len(group.parts) else []


def _offer(projection: Projection, copies: list[WorkingCopy]) -> Matrix:
    """Return a projection's matrix, which is written from the trained weights."""
    matrix, group = projection.matrix, projection.adapters
    assert isinstance(group, WeightGroup)
    absent = matrix.new_full((), float("nan")).expand(matrix.shape)
    parameters = [copy.parameter for copy in copies]
    group.joint_a, group.joint_b = (
        group.joint_a.new_empty(0, projection.num_in),
        group.joint_b.new_empty(projection.num_out, 0),
    )

    def show(whole: Tensor) -> None:
        projection.matrix = whole

    def hide() -> None:
        projection.matrix = absent

    def fill(whole: Tensor) -> None:
        for parameter, out in zip(parameters, group.outs, strict=True):
            whole[out].copy_(parameter)

    return Matrix(matrix, show, hide, fill)
