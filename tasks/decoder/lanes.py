"""Several adapters side by side on one frozen model: the frozen products are made for all rows at once.

A batch holds the rows of each adapter one behind the other, a lane each. What is frozen sees one batch; the thin
products x A' and (x A') B' see each row with the matrices of its lane. So K trainings share the work on the weights,
and each has the gradients that it would have alone.

Dimensions: `K` lanes, `T` tokens of a batch, `H` inputs, `O` outputs of all layers of a group, `R` the largest of the
lanes' ranks of all its layers together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tasks.decoder.adapters import AdapterGroup, Part, bind_gradients, lay_out
from tasks.decoder.decoder import Decoder
from tasks.decoder.elementwise import Quantized
from tasks.decoder.grouped_products import multiply_grouped
from tasks.decoder.lane_products import OuterSums, add_thin
from tasks.decoder.layer import Layer
from tasks.decoder.mixers import list_inner
from tasks.decoder.module_reading import UnknownDecoderError
from tasks.decoder.projections import AnyProjection, Input, Projection

Adapters = Sequence[dict[nn.Linear, tuple[nn.Parameter, nn.Parameter, float]]]
"""Of each lane: A [r, H], B [O, r] and the scale of each adapted linear layer."""


_RANK_MULTIPLE = 8  # rows of 16 bytes, which grouped products on a GPU want


class LanePlaces:
    """Where each lane's rows lie in the batch that is computed; one object for all projections."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._ends: dict[int, tuple[list[int], Tensor]] = {}

    def set(self, *counts: Sequence[int], device: torch.device) -> None:
        """Say how many rows each lane has: of the tokens, and of the positions that go through the last layer's end.

        Where both are as many in all, all positions go through it, and the lanes are the same.
        """
        self._ends = {}
        for rows in counts:
            ends = torch.tensor(rows, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self._ends[int(ends[-1])] = ([0, *ends.tolist()], ends.to(device, non_blocking=True))

    def clear(self) -> None:
        """Have the first lane take all rows, whatever their number."""
        self._ends = {}

    def find(self, num_rows: int, device: torch.device) -> tuple[list[slice], Tensor]:
        """Return the rows of each lane, and where they end [K]."""
        if not self._ends:
            ends = torch.full((self.number,), num_rows, dtype=torch.int32, device=device)
            return [slice(0, num_rows), *[slice(num_rows, num_rows)] * (self.number - 1)], ends
        borders, ends = self._ends[num_rows]
        return [slice(*borders[lane : lane + 2]) for lane in range(self.number)], ends


@dataclass
class LaneGroup:
    """The adapters of all lanes at one group of linear layers."""

    lanes: tuple[AdapterGroup, ...]
    """Their joint matrices lie in the stacks."""
    stack_a: Tensor
    """[K, R, H]"""
    stack_b: Tensor
    """[K, O, R]"""
    places: LanePlaces
    sums: list[OuterSums] = field(default_factory=list)
    """What adds up gradients that stay; made at the first use."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained, lane by lane."""
        return tuple(parameter for group in self.lanes for parameter in group.parameters)

    @property
    def joint_a(self) -> Tensor:
        """[R, H] of the first lane; what asks for it wants to know the sizes."""
        return self.stack_a[0]

    @property
    def joint_b(self) -> Tensor:
        """[O, R] of the first lane."""
        return self.stack_b[0]

    def compute_grads(self, grads: Tensor, small: Tensor, inputs: Tensor, projected: Tensor) -> list[Tensor | None]:
        """Return the gradients of `parameters`, lane by lane; see `AdapterGroup`."""
        rows, ends = self.places.find(len(inputs), inputs.device)
        if all(group.grad_a is not None or not group.parameters for group in self.lanes) and self.parameters:
            self._add_grads(grads, small, inputs, projected, rows, ends)
            return [None] * len(self.parameters)
        results: list[Tensor | None] = []
        for group, lane in zip(self.lanes, rows, strict=True):
            rank = group.joint_a.shape[0]
            results += group.compute_grads(grads[lane], small[lane, :rank], inputs[lane], projected[lane, :rank])
        return results

    def _add_grads(
        self, grads: Tensor, small: Tensor, inputs: Tensor, projected: Tensor, rows: list[slice], ends: Tensor
    ) -> None:
        """Add the gradients where they stay, those of a matrix for all lanes at once."""
        if not self.sums:
            self.sums = self._plan_sums()
        of_a, *of_b = self.sums
        of_a.add([_require(group.grad_a) for group in self.lanes], small, inputs, ends, rows)
        for number, (out, of_part) in enumerate(zip(self.lanes[0].outs, self._list_adapted(of_b), strict=True)):
            if of_part is not None:
                targets = [_require(_require(group.parts[number].lora_b).grad) for group in self.lanes]
                of_part.add(targets, projected, grads[:, out], ends, rows)

    def _plan_sums(self) -> list[OuterSums]:
        """Return what adds up the gradients of all A together, then those of each adapted layer's B."""
        lanes = self.lanes
        none = (0,) * len(lanes)
        plans = [OuterSums(none, tuple(group.joint_a.shape[0] for group in lanes), (1.0,) * len(lanes), False)]
        for number, part in enumerate(lanes[0].parts):
            if part.lora_b is not None:
                slices = [group.ranks[number] for group in lanes]
                firsts, ranks = tuple(each.start for each in slices), tuple(each.stop - each.start for each in slices)
                plans.append(OuterSums(firsts, ranks, tuple(group.parts[number].scale for group in lanes), True))
        return plans

    def _list_adapted(self, of_b: list[OuterSums]) -> list[OuterSums | None]:
        """Give each layer what adds up its gradients; None where it has no adapter."""
        left = iter(of_b)
        return [None if part.lora_b is None else next(left) for part in self.lanes[0].parts]


@dataclass
class LaneProjection:
    """A group of frozen linear layers with an adapter for each lane; see the module's text."""

    weight: Tensor
    """[O, H]"""
    bias: Tensor | None
    """[O]"""
    adapters: LaneGroup
    site: int

    def allocate_input(self, num_tokens: int, *, drops: bool = False) -> Input:
        """Return room for x and x A', apart."""
        assert not drops, "lanes have no dropout"
        values = self.weight.new_empty(num_tokens, self.weight.shape[1])
        projected = self.weight.new_zeros(num_tokens, self.adapters.stack_a.shape[1])
        return Input(values, values, projected, None, None)

    def allocate_grad(self, num_tokens: int) -> tuple[Tensor, Quantized | None]:
        """Return room for g [T, O]."""
        return self.weight.new_empty(num_tokens, self.weight.shape[0]), None

    def forget_grad(self) -> None:
        """Do nothing: no float8 copy is ever asked for here."""

    def project_small(self, inputs: Input) -> None:
        """Fill in x A'."""
        if inputs.projected.shape[1]:
            inputs.projected.copy_(self._multiply(inputs.values, self.adapters.stack_a.transpose(1, 2)))

    def forward_values(self, values: Tensor, inputs: Input) -> Tensor:
        """Copy x into its place, and go on as `forward`."""
        inputs.values.copy_(values)
        return self.forward(inputs)

    def forward(self, inputs: Input) -> Tensor:
        """Fill in x A' and return y [T, O]."""
        self.project_small(inputs)
        weight = self.weight.t()
        outputs = (
            torch.mm(inputs.values, weight) if self.bias is None else torch.addmm(self.bias, inputs.values, weight)
        )
        if inputs.projected.shape[1]:
            self._add(outputs, inputs.projected, self.adapters.stack_b.transpose(1, 2))
        return outputs

    def backward(
        self, grad: Tensor, *, needs_input: bool, drops: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return g B [T, R] and the gradient of x [T, H]."""
        assert not drops
        rank = self.adapters.stack_a.shape[1]
        small = self._multiply(grad, self.adapters.stack_b) if rank else grad.new_empty(len(grad), 0)
        if not needs_input:
            return small, None, None
        result = torch.mm(grad, self.weight)
        if rank:
            self._add(result, small, self.adapters.stack_a)
        return small, result, None

    def _add(self, out: Tensor, thin: Tensor, matrices: Tensor) -> None:
        """Add each thin row times the matrix of its lane [K, R, width] to the output."""
        rows, ends = self.adapters.places.find(len(out), out.device)
        add_thin(out, thin, matrices, ends, max(lane.stop - lane.start for lane in rows))

    def _multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Return each row times the matrix of its lane [K, inputs, outputs]."""
        _, ends = self.adapters.places.find(len(rows), rows.device)
        return multiply_grouped(rows, matrices, ends)


def put_side_by_side(decoder: Decoder, adapters: Adapters) -> tuple[Decoder, LanePlaces]:
    """Return the decoder with an adapter for each lane in place of its own, and where the lanes' rows are told.

    The frozen weights stay where they are.

    Args:
        decoder: recognized, with one adapter.
        adapters: of the lanes, beside the same linear layers.

    Raises:
        UnknownDecoderError: it has dropout, routed experts, FP8 weights, or a mixer with projections of its own.
    """
    if decoder.dropout is not None or decoder.layer_inputs is not None or decoder.weights is not None:
        raise UnknownDecoderError("dropout, layers' own inputs and own weights have no lanes")
    places = LanePlaces(len(adapters))

    def take(projection: AnyProjection | None) -> Any:
        return None if projection is None else _take(projection, adapters, places)

    def change(layer: Layer) -> Layer:
        if layer.experts is not None or layer.layer_input is not None or list_inner(layer.mixer):
            raise UnknownDecoderError("routed experts and mixers with projections of their own have no lanes")
        return replace(
            layer,
            qkv=take(layer.qkv),
            output=take(layer.output),
            gate_up=take(layer.gate_up),
            down=take(layer.down),
        )

    return replace(decoder, layers=tuple(change(layer) for layer in decoder.layers)), places


def bind_lanes(decoder: Decoder) -> list[Tensor | None]:
    """Give each lane's matrices gradients that stay where they are, a vector a lane; None where that is not done."""
    groups = [group for layer in decoder.layers for group in layer.adapters if isinstance(group, LaneGroup)]
    return [bind_gradients(group.lanes[lane] for group in groups) for lane in range(groups[0].places.number)]


def _take(projection: AnyProjection, adapters: Adapters, places: LanePlaces) -> LaneProjection:
    """Return a projection with an adapter for each lane."""
    own = projection.adapters
    if not isinstance(projection, Projection) or not isinstance(own, AdapterGroup):
        raise UnknownDecoderError("FP8 weights have no lanes")
    weight = projection.matrix[: projection.num_out, : projection.num_in]
    parts = [[_find(part.module, lane) for part in own.parts] for lane in adapters]
    ranks = [[0 if part.lora_a is None else part.lora_a.shape[0] for part in lane] for lane in parts]
    widest = -(-max(sum(lane) for lane in ranks) // _RANK_MULTIPLE) * _RANK_MULTIPLE
    stack_a = weight.new_zeros(len(parts), widest, projection.num_in)
    stack_b = weight.new_zeros(len(parts), projection.num_out, widest)
    groups = tuple(
        AdapterGroup(
            tuple(lane), own.outs, lay_out(sizes), stack_a[number, : sum(sizes)], stack_b[number, :, : sum(sizes)]
        )
        for number, (lane, sizes) in enumerate(zip(parts, ranks, strict=True))
    )
    return LaneProjection(weight, projection.bias, LaneGroup(groups, stack_a, stack_b, places), projection.site)


def _require(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _find(module: nn.Linear, adapters: dict[nn.Linear, tuple[nn.Parameter, nn.Parameter, float]]) -> Part:
    found = adapters.get(module)
    return Part(module, None, None, 0.0) if found is None else Part(module, *found)
