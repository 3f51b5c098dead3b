"""Frozen linear layers that share an input, with their LoRA matrices, as one product each way.

Dimensions: `T` tokens, `H` inputs, `O` outputs of all layers of the group, `R` their ranks together.

With y = x W' + x A' B' for the joint matrices of `adapters`, all layers of a group lie in one matrix

    M = [ W  B ]   [O + R, H + R]        x~ = [ x  x A' ]  [T, H + R]
        [ A  0 ]                         g~ = [ g  g B  ]  [T, O + R]

so that the whole forward product is x~ M[:O]', and the whole input gradient g~ M[:, :H]: the adapter costs no pass over
the outputs of its own. The small products x A' and g B fill the last columns of x~ and g~, which whoever makes x or g
gets from here with that room.

With dropout x A' becomes (m x) A' for a mask m, and the adapter's part of the input gradient, (g B) A, gets the mask as
well: it is then a product of its own, which whoever goes on with the gradient adds to the frozen layers' part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tasks.decoder.adapters import AdapterGroup, Part, join_biases, lay_out
from tasks.decoder.elementwise import Quantized
from tasks.decoder.rooms import copy_rows, make_room
from tasks.decoder.weights import TrainedWeights, WeightGroup


class Input(NamedTuple):
    """Room for a group's input."""

    joint: Tensor
    """[T, H + R]"""
    values: Tensor
    """x [T, H]: its first columns, written by whoever makes x."""
    projected: Tensor
    """x A' [T, R]: its last columns, written by the group."""
    quantized: Quantized | None
    """Where a float8 copy of x is wanted as well."""
    dropped: Tensor | None
    """[T, H]: where a masked copy of x is wanted, which is then what goes through A."""

    @property
    def adapted(self) -> Tensor:
        """What goes through A."""
        return self.values if self.dropped is None else self.dropped


class AnyProjection(Protocol):
    """What `Projection` and `quantized.QuantizedProjection` have in common."""

    @property
    def adapters(self) -> AdapterGroup | WeightGroup:
        """What is trained: matrices beside the weights, or the weights themselves."""
        ...

    @property
    def site(self) -> int:
        """Whose masks dropout draws."""
        ...

    def allocate_input(self, num_tokens: int, *, drops: bool = False) -> Input:
        """Return room for x; for a masked copy as well where the adapter drops and there is one."""
        ...

    def allocate_grad(self, num_tokens: int) -> tuple[Tensor, Quantized | None]:
        """Return room for g [T, O], and where a float8 copy is wanted as well."""
        ...

    def forget_grad(self) -> None:
        """Make no float8 copy of the gradient, although one was asked for."""
        ...

    def project_small(self, inputs: Input) -> None:
        """Fill in x A'."""
        ...

    def forward_values(self, values: Tensor, inputs: Input) -> Tensor:
        """Put x, which came without room, into its place, and go on as `forward`."""
        ...

    def forward(self, inputs: Input) -> Tensor:
        """Fill in x A' and return y [T, O]."""
        ...

    def backward(
        self, grad: Tensor, *, needs_input: bool, drops: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return g B [T, R], the gradient of x [T, H], and where the adapter drops that of the masked copy apart.

        g [T, O] is best what `allocate_grad` gave.
        """
        ...


@dataclass
class Projection:
    """A group of linear layers in their own dtype; see the module's text."""

    matrix: Tensor
    """M"""
    bias: Tensor | None
    """[O]"""
    adapters: AdapterGroup | WeightGroup
    num_in: int
    """H"""
    num_out: int
    """O"""
    site: int

    def release(self) -> None:
        """Let go of the weights; the group is of no use after it."""
        assert isinstance(self.adapters, AdapterGroup)
        self.matrix = self.matrix.new_empty(0)
        self.adapters.joint_a = self.adapters.joint_b = self.matrix

    def allocate_input(self, num_tokens: int, *, drops: bool = False) -> Input:
        """Return room for x~."""
        joint = make_room(self.matrix, num_tokens, self.matrix.shape[1])
        dropped = joint.new_empty(num_tokens, self.num_in) if drops and self.adapters.joint_a.shape[0] else None
        return Input(joint, joint[:, : self.num_in], joint[:, self.num_in :], None, dropped)

    def allocate_grad(self, num_tokens: int) -> tuple[Tensor, None]:
        """Return the first columns of room for g~."""
        return make_room(self.matrix, num_tokens, self.matrix.shape[0])[:, : self.num_out], None

    def forget_grad(self) -> None:
        """Do nothing: no float8 copy is ever asked for here."""

    def forward_values(self, values: Tensor, inputs: Input) -> Tensor:
        """Copy x into its place, and go on as `forward`."""
        copy_rows(values, inputs.values)
        return self.forward(inputs)

    def project_small(self, inputs: Input) -> None:
        """Fill in x A'."""
        if inputs.projected.shape[1]:
            torch.mm(inputs.adapted, self.adapters.joint_a.t(), out=inputs.projected)

    def forward(self, inputs: Input) -> Tensor:
        """Fill in x A' and return y [T, O]."""
        self.project_small(inputs)
        weight = self.matrix[: self.num_out].t()
        return torch.mm(inputs.joint, weight) if self.bias is None else torch.addmm(self.bias, inputs.joint, weight)

    def backward(
        self, grad: Tensor, *, needs_input: bool, drops: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return g B [T, R] and the gradient of x [T, H]; where the adapter drops, that of the masked copy apart."""
        joint = self._find_room(grad)
        small = joint[:, self.num_out :]
        if small.shape[1]:
            torch.mm(joint[:, : self.num_out], self.adapters.joint_b, out=small)
        if not needs_input:
            return small, None, None
        if not (drops and small.shape[1]):
            return small, torch.mm(joint, self.matrix[:, : self.num_in]), None
        frozen = self.matrix[: self.num_out, : self.num_in]
        return small, torch.mm(joint[:, : self.num_out], frozen), torch.mm(small, self.adapters.joint_a)

    def _find_room(self, grad: Tensor) -> Tensor:
        """Return g~ for g: the memory around it when it came from `allocate_grad`, else a copy."""
        num_tokens, width = grad.shape[0], self.matrix.shape[0]
        end = (grad.storage_offset() + num_tokens * width) * grad.element_size()
        if grad.stride() == (width, 1) and grad.untyped_storage().nbytes() >= end:
            return grad.as_strided((num_tokens, width), (width, 1))
        joint = make_room(grad, num_tokens, width)
        copy_rows(grad, joint[:, : self.num_out])
        return joint


def build_projection(parts: Sequence[Part], site: int = 0, weights: TrainedWeights | None = None) -> Projection:
    """Lay the parts' weights into one matrix; those of its dtype become views of it, so that nothing lies twice.

    Args:
        parts: of the group.
        site: see `AnyProjection`.
        weights: of the decoder, where its own are trained; they say the matrix's dtype then, and follow the group's.
    """
    first = parts[0].module.weight
    sizes = [part.module.weight.shape[0] for part in parts]
    ranks = [0 if part.lora_a is None else part.lora_a.shape[0] for part in parts]
    num_in, num_out = first.shape[1], sum(sizes)
    dtype = first.dtype if weights is None else weights.dtype
    matrix = first.data.new_zeros(num_out + sum(ranks), num_in + sum(ranks), dtype=dtype)
    bias = join_biases(parts, dtype)
    outs = lay_out(sizes)
    for part, out in zip(parts, outs, strict=True):
        view = matrix[out, :num_in]
        view.copy_(part.module.weight.data)
        if part.module.weight.dtype == dtype:
            part.module.weight.data = view
    joint_a, joint_b = matrix[num_out:, :num_in], matrix[:num_out, num_in:]
    adapters: AdapterGroup | WeightGroup = AdapterGroup(tuple(parts), outs, lay_out(ranks), joint_a, joint_b)
    if weights is not None:
        group = WeightGroup(tuple(parts), outs, joint_a, joint_b, weights)
        _follow(weights, group, matrix, bias)
        if group.parameters:
            adapters = group
    return Projection(matrix, bias, adapters, num_in, num_out, site)


def _follow(weights: TrainedWeights, group: WeightGroup, matrix: Tensor, bias: Tensor | None) -> None:
    """Have the matrix [O, H] and the bias [O] follow what of the group's is trained."""
    for part, out in zip(group.parts, group.outs, strict=True):
        if part.module.weight.requires_grad:
            weights.add(part.module.weight)
            if part.module.weight.dtype != weights.dtype:
                weights.follow(part.module.weight, matrix[out])
    for part, out in zip(group.parts, group.outs, strict=True):
        if part.module.bias is not None and part.module.bias.requires_grad:
            assert bias is not None
            weights.add(part.module.bias)
            weights.follow(part.module.bias, bias[out])
    if group.parameters:
        weights.groups.append(group)
