"""The frozen matrices of a layer, and how it is told where they lie now; for `divided`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.decoder.adapters import AdapterGroup
from tasks.decoder.elementwise import Quantized
from tasks.decoder.grouped import GroupedProjection
from tasks.decoder.layer import Layer
from tasks.decoder.projections import Projection

# What a pass reads of a layer: matrices that both ways read, and those of one way alone.
BOTH, FORWARD, BACKWARD = "both", "forward", "backward"


class Matrix(NamedTuple):
    """A frozen matrix, and what to do with its place in a slot."""

    values: Tensor
    """Whole."""
    show: Callable[[Tensor], None]
    """Have the layer use it there."""
    hide: Callable[[], None]
    """Have the layer use nothing."""
    fill: Callable[[Tensor], None] | None = None
    """Write what is trained into it."""


def list_matrices(layer: Layer) -> dict[str, list[Matrix]]:
    """Return the frozen matrices of a layer's products, by the ways that read them.

    What else is frozen in it (norms, routers, convolutions) is small, and stays whole.
    """
    found: dict[str, list[Matrix]] = {BOTH: [], FORWARD: [], BACKWARD: []}
    for projection in layer.projections:
        if isinstance(projection, Projection):
            found[BOTH].append(_offer_projection(projection))
        else:
            for name, attribute in ((FORWARD, "weight"), (BACKWARD, "turned")):
                found[name] += _offer_quantized(projection, attribute)
    for experts in () if layer.experts is None else (layer.experts.gate_up, layer.experts.down):
        if isinstance(experts, GroupedProjection):
            found[BOTH].append(_offer_experts(experts))
        else:
            found[BOTH] += _offer_quantized(experts, "weight")
    return found


def _offer_projection(projection: Projection) -> Matrix:
    """Give the adapter's working copies memory of their own, and return the joint matrix."""
    group, num_in, num_out = projection.adapters, projection.num_in, projection.num_out
    assert isinstance(group, AdapterGroup)
    group.joint_a, group.joint_b = group.joint_a.clone(), group.joint_b.clone()
    matrix = projection.matrix
    absent = matrix.new_full((), torch.nan).expand(matrix.shape)

    def show(whole: Tensor) -> None:
        projection.matrix = whole
        for part, out in zip(group.parts, group.outs, strict=True):
            part.module.weight.data = whole[out, :num_in]

    def hide() -> None:
        projection.matrix = absent
        for part in group.parts:
            part.module.weight.data = absent.new_empty(0)

    def fill(whole: Tensor) -> None:
        whole[num_out:, :num_in].copy_(group.joint_a)
        whole[:num_out, num_in:].copy_(group.joint_b)

    return Matrix(matrix, show, hide, fill if group.joint_a.shape[0] else None)


def _offer_quantized(projection: Any, attribute: str) -> list[Matrix]:
    """Return the values and the scales of a matrix in float8, or of one of each expert."""
    values, scales = getattr(projection, attribute)
    absent = [values.new_empty(()).expand(values.shape), scales.new_full((), torch.nan).expand(scales.shape)]

    def put(number: int, tensor: Tensor) -> None:
        held = list(getattr(projection, attribute))
        held[number] = tensor
        setattr(projection, attribute, Quantized(*held))

    def offer(number: int, tensor: Tensor) -> Matrix:
        return Matrix(tensor, lambda whole: put(number, whole), lambda: put(number, absent[number]))

    return [offer(0, values), offer(1, scales)]


def _offer_experts(projection: GroupedProjection) -> Matrix:
    """Give the adapters' working copies memory of their own, and return the joint matrices of all experts."""
    group, num_in, num_out = projection.adapters, projection.num_in, projection.num_out
    group.joint_a, group.joint_b = group.joint_a.clone(), group.joint_b.clone()
    matrices, rank, part = projection.matrices, group.rank, group.part
    absent = matrices.new_full((), torch.nan).expand(matrices.shape)

    def show(whole: Tensor) -> None:
        projection.matrices = whole
        inside = whole[:, :num_out, :num_in]
        part.weight.data = inside.mT if part.is_turned else inside

    def hide() -> None:
        show(absent)

    def fill(whole: Tensor) -> None:
        whole[:, num_out : num_out + rank, :num_in].copy_(group.joint_a)
        whole[:, :num_out, num_in : num_in + rank].copy_(group.joint_b)

    return Matrix(matrices.contiguous(), show, hide, fill if rank else None)
