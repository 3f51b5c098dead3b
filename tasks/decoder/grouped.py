"""Frozen matrices of routed experts with their LoRA matrices: one grouped product each way.

Dimensions: `S` rows ordered by expert, `E` experts, `H` inputs, `O` outputs, `R` rank, `C` further columns.

As in `projections`, but with a matrix for each expert,

    M = [ W  B  b ]   [E, O + C, H + C]        x~ = [ x  x A'  w ]  [S, H + C]
        [ A  0  0 ]                            g~ = [ g  g B  g b ] [S, O + C]
        [ 0  0  0 ]

so that all rows' products are x~ M[:O]' and g~ M[:, :H], the adapter and the bias b (of rows that weigh w) included.
C is R, one more where there is a bias, rounded up to what grouped products on a GPU want: rows on 16 bytes.

PEFT keeps an adapted parameter's matrices as A [E R, H] and B [O, R E]; the joint ones are copies of them.
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tasks.decoder.expert_float8 import Float8Copy
from tasks.decoder.grouped_products import multiply_grouped
from tasks.decoder.rooms import copy_rows, make_room

ALIGNMENT = 8
"""In values of bf16."""


class ExpertPart(NamedTuple):
    """A parameter that holds a matrix of each expert."""

    weight: nn.Parameter
    """[E, O, H], or [E, H, O] where it is turned. Frozen."""
    bias: Tensor | None
    """[E, O]"""
    lora_a: nn.Parameter | None
    """[E R, H]; None where it has no adapter."""
    lora_b: nn.Parameter | None
    """[O, R E]"""
    scale: float
    """s: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    is_turned: bool = False


@dataclass
class ExpertAdapters:
    """The adapter of one such parameter, and its working copies in the joint matrices."""

    part: ExpertPart
    joint_a: Tensor
    """[E, R, H]; R is 0 without an adapter."""
    joint_b: Tensor
    """[E, O, R], of s B'."""
    versions: list[int] = field(default_factory=list)
    """Of the trained matrices when they were last copied."""
    is_bound: bool = False
    """Passes add to the gradients in place."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained, A before B."""
        return tuple(p for p in (self.part.lora_a, self.part.lora_b) if p is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the working copies."""
        return self.joint_a.dtype

    @property
    def rank(self) -> int:
        """Return R."""
        return self.joint_a.shape[1]

    def invalidate(self) -> None:
        """Say that the trained matrices have changed."""
        self.versions = []

    @torch.no_grad()
    def copy(self) -> None:
        """Bring the working copies up to date."""
        if self.part.lora_a is not None and self.part.lora_b is not None:
            num_experts, rank, _ = self.joint_a.shape
            self.joint_a.copy_(self.part.lora_a.view(num_experts, rank, -1))
            turned = self.part.lora_b.view(-1, rank, num_experts).permute(2, 0, 1)
            self.joint_b.copy_(turned * self.part.scale)

    def bind(self, flat: Tensor, start: int) -> int:
        """Take the gradients' place in one vector of zeros, from `start` on; return its end."""
        for parameter in self.parameters:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self.is_bound = bool(self.parameters)
        return start

    def give(self, grad_a: Tensor, grad_b: Tensor) -> list[Tensor | None]:
        """Return the gradients of `parameters`; none where they were added in place.

        Args:
            grad_a: [E, R, H]
            grad_b: [E, R, O], of s B'.
        """
        turned = grad_b.permute(2, 1, 0)
        if self.is_bound:
            (a, b) = self.parameters
            assert a.grad is not None
            assert b.grad is not None
            a.grad.view_as(grad_a).add_(grad_a)
            b.grad.view(turned.shape).add_(turned, alpha=self.part.scale)
            return [None, None]
        return [grad_a.flatten(0, 1), (turned * self.part.scale).flatten(1)]


class RowRoom(NamedTuple):
    """Room for rows that are made for a product."""

    joint: Tensor
    """[S, H + C], or [S, O + C] of gradients"""
    values: Tensor
    """Its first columns, written by whoever makes the rows."""
    float8: Float8Copy | None
    """Where a float8 copy of them is wanted as well."""


class AnyGrouped(Protocol):
    """What `GroupedProjection` and `quantized_experts.QuantizedExperts` have in common."""

    @property
    def adapters(self) -> ExpertAdapters:
        """What is trained."""
        ...

    @property
    def has_bias(self) -> bool:
        """Whether a column further on has a bias."""
        ...

    @property
    def num_experts(self) -> int:
        """Return E."""
        ...

    @property
    def num_in(self) -> int:
        """Return H."""
        ...

    @property
    def num_out(self) -> int:
        """Return O."""
        ...

    def forward_tokens(
        self, values: Tensor, tokens: Tensor, ends: Tensor, ops: ModuleType, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return y [S, O] and x A' and w [S, C] of x, the rows of some tokens.

        Args:
            values: [T, H]
            tokens: [S], ordered by expert.
            ends: [E] int32, where each expert's rows end.
            ops: `expert_elementwise`, or its kernels.
            weights: w [S], which the bias is multiplied with; one each where None.
        """
        ...

    def backward_tokens(self, grad: Tensor, tokens: Tensor, ends: Tensor, ops: ModuleType) -> tuple[Tensor, Tensor]:
        """Return g B and g b [S, C], and the gradient of x [S, H], of g, the rows of some tokens in grad [T, O]."""
        ...

    def allocate_input(self, num_rows: int, ends: Tensor) -> RowRoom:
        """Return room for x [S, H]."""
        ...

    def allocate_grad(self, num_rows: int, ends: Tensor) -> RowRoom:
        """Return room for g [S, O]."""
        ...

    def project_small(self, rows: RowRoom, ends: Tensor, weights: Tensor | None) -> Tensor:
        """Return x A' and w [S, C]; see `forward_tokens`."""
        ...

    def forward(self, rows: RowRoom, small: Tensor, ends: Tensor) -> Tensor:
        """Return y [S, O] of x and what `project_small` gave."""
        ...

    def backward(self, rows: RowRoom, ends: Tensor, *, needs_input: bool) -> tuple[Tensor, Tensor | None]:
        """Return g B and g b [S, C], and the gradient of x [S, H]."""
        ...


@dataclass
class GroupedProjection:
    """The matrices of all experts in their own dtype; see the module's text."""

    matrices: Tensor
    """M"""
    adapters: ExpertAdapters
    num_in: int
    """H"""
    num_out: int
    """O"""
    has_bias: bool

    @property
    def num_experts(self) -> int:
        """Return E."""
        return self.matrices.shape[0]

    @property
    def num_further(self) -> int:
        """Return C."""
        return self.matrices.shape[2] - self.num_in

    def release(self) -> None:
        """Let go of the weights; the projection is of no use after it."""
        self.matrices = self.matrices.new_empty(0)
        self.adapters.joint_a = self.adapters.joint_b = self.matrices
        weight = self.adapters.part.weight
        weight.data = weight.new_full((), torch.nan).expand(weight.shape)  # no memory; what counts goes by the shape

    def allocate_input(self, num_rows: int, ends: Tensor) -> RowRoom:
        """Return room for x~ [S, H + C]."""
        joint = make_room(self.matrices, num_rows, self.num_in + self.num_further)
        return RowRoom(joint, joint[:, : self.num_in], None)

    def allocate_grad(self, num_rows: int, ends: Tensor) -> RowRoom:
        """Return room for g~ [S, O + C]."""
        joint = make_room(self.matrices, num_rows, self.num_out + self.num_further)
        return RowRoom(joint, joint[:, : self.num_out], None)

    def forward_tokens(
        self, values: Tensor, tokens: Tensor, ends: Tensor, ops: ModuleType, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gather x, and go on as `forward`."""
        rows = self.allocate_input(len(tokens), ends)
        ops.gather_rows(values, tokens, rows.values)
        small = self.project_small(rows, ends, weights)
        return self.forward(rows, small, ends), small

    def backward_tokens(self, grad: Tensor, tokens: Tensor, ends: Tensor, ops: ModuleType) -> tuple[Tensor, Tensor]:
        """Gather g, and go on as `backward`."""
        rows = self.allocate_grad(len(tokens), ends)
        ops.gather_rows(grad, tokens, rows.values)
        small, result = self.backward(rows, ends, needs_input=True)
        assert result is not None
        return small, result

    def project_small(self, rows: RowRoom, ends: Tensor, weights: Tensor | None) -> Tensor:
        """Fill in the last columns of x~, and return a copy of them [S, C]; see `AnyGrouped`."""
        last = rows.joint[:, self.num_in :]
        if not self.num_further:
            return last
        inner = self.matrices[:, self.num_out :, : self.num_in]
        small = multiply_grouped(rows.values, inner.mT, ends)
        if self.has_bias:
            small[:, self.adapters.rank] = 1.0 if weights is None else weights.to(small.dtype)
        copy_rows(small, last)
        return small

    def forward(self, rows: RowRoom, small: Tensor, ends: Tensor) -> Tensor:
        """Return y [S, O] of x~."""
        return multiply_grouped(rows.joint, self.matrices[:, : self.num_out].mT, ends)

    def backward(self, rows: RowRoom, ends: Tensor, *, needs_input: bool) -> tuple[Tensor, Tensor | None]:
        """Fill in the last columns of g~; return them [S, C] and the gradient of x [S, H]."""
        small = rows.joint[:, self.num_out :]
        if self.num_further:
            outer = self.matrices[:, : self.num_out, self.num_in :]
            small = multiply_grouped(rows.values, outer, ends)
            copy_rows(small, rows.joint[:, self.num_out :])
        if not needs_input:
            return small, None
        return small, multiply_grouped(rows.joint, self.matrices[:, :, : self.num_in], ends)


def count_further(part: ExpertPart) -> int:
    """Return C of a parameter: its rank, one more with a bias, rounded up."""
    num_experts = part.weight.shape[0]
    wanted = (0 if part.lora_a is None else part.lora_a.shape[0] // num_experts) + (part.bias is not None)
    return -(-wanted // ALIGNMENT) * ALIGNMENT


def build_grouped_projection(part: ExpertPart) -> GroupedProjection:
    """Lay a parameter's weights into joint matrices; it becomes a view of them, so that nothing lies twice."""
    weight = part.weight.data.mT if part.is_turned else part.weight.data
    num_experts, num_out, num_in = weight.shape
    rank = 0 if part.lora_a is None else part.lora_a.shape[0] // num_experts
    further = count_further(part)
    matrices = weight
    if further:
        matrices = weight.new_zeros(num_experts, num_out + further, num_in + further)
        inside = matrices[:, :num_out, :num_in]
        inside.copy_(weight)
        part.weight.data = inside.mT if part.is_turned else inside
    if part.bias is not None:
        matrices[:, :num_out, num_in + rank].copy_(part.bias)
    joint_a = matrices[:, num_out : num_out + rank, :num_in]
    joint_b = matrices[:, :num_out, num_in : num_in + rank]
    adapters = ExpertAdapters(part, joint_a, joint_b)
    return GroupedProjection(matrices, adapters, num_in, num_out, has_bias=part.bias is not None)
