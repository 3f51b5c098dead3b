"""Frozen matrices of routed experts in float8, with their LoRA matrices in 16 bits: one grouped product each way.

Dimensions: as in `grouped`: `S` rows, `E` experts, `H` inputs, `O` outputs, `R` rank, `C` further columns.

One float8 copy serves both directions, so that experts take half the memory of 16 bits. It has a scale for each
output row, s [O]. Forward, x is quantized by row, and the sums over H are multiplied with both scales. Backward, the
sum is over O: the gradient's columns are multiplied with s before it is quantized by row, and the matrices, whose
numbers stay as they are, are transposed for this one product (float8 products want both factors along their rows):
bytes that are moved once, and are gone after it.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tasks.decoder import expert_float8
from tasks.decoder.elementwise import Quantized
from tasks.decoder.expert_float8 import make_copy_room
from tasks.decoder.grouped import ExpertAdapters, GroupedProjection, RowRoom
from tasks.decoder.grouped_products import multiply_grouped
from tasks.decoder.rooms import make_room

# Of the comparison with plain PyTorch: more than a tile of rows, and of experts.
_CHECKED_EXPERTS, _CHECKED_ROWS = 2, 150


@dataclass
class QuantizedExperts:
    """The matrices of all experts in float8; a `grouped.AnyGrouped`."""

    weight: Quantized
    """[E, O, H], and the scales [E, O]"""
    inner: Tensor
    """[E, C, H]: A, and zeros"""
    outer: Tensor
    """[E, O, C]: s B', the bias, and zeros"""
    adapters: ExpertAdapters
    has_bias: bool
    ops: ModuleType
    """`expert_float8`, or its Triton kernels."""

    @property
    def num_experts(self) -> int:
        """Return E."""
        return self.weight.values.shape[0]

    @property
    def num_in(self) -> int:
        """Return H."""
        return self.weight.values.shape[2]

    @property
    def num_out(self) -> int:
        """Return O."""
        return self.weight.values.shape[1]

    def allocate_input(self, num_rows: int, ends: Tensor) -> RowRoom:
        """Return room for x [S, H] and its float8 copy."""
        values = make_room(self.inner, num_rows, self.num_in)
        return RowRoom(values, values, make_copy_room(values, num_rows, self.num_in, None, ends))

    def allocate_grad(self, num_rows: int, ends: Tensor) -> RowRoom:
        """Return room for g [S, O] and the float8 copy of g s."""
        values = make_room(self.outer, num_rows, self.num_out)
        return RowRoom(values, values, make_copy_room(values, num_rows, self.num_out, self.weight.scales, ends))

    def forward_tokens(
        self, values: Tensor, tokens: Tensor, ends: Tensor, ops: ModuleType, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Quantize each token once; its rows are gathered by the products."""
        small = values.new_empty(len(tokens), 0)
        if self.inner.shape[1]:
            small = self._add_weights(self.ops.project_rows(values, tokens, self.inner, ends), weights)
        quantized = self.ops.quantize_expert_rows(values, None, ends)
        outputs: Tensor = self.ops.multiply_quantized(
            quantized, self.weight.values, self.weight.scales, small, self.outer, ends, tokens
        )
        return outputs, small

    def backward_tokens(self, grad: Tensor, tokens: Tensor, ends: Tensor, ops: ModuleType) -> tuple[Tensor, Tensor]:
        """Quantize the rows as they are gathered: with s, they are each expert's own."""
        small = grad.new_empty(len(tokens), 0)
        if self.outer.shape[2]:
            small = self.ops.project_rows(grad, tokens, self.outer.mT, ends)
        return small, self._return_input(
            self.ops.quantize_expert_rows(grad, self.weight.scales, ends, tokens), small, ends
        )

    def project_small(self, rows: RowRoom, ends: Tensor, weights: Tensor | None) -> Tensor:
        """Return x A' and w [S, C]; see `grouped.AnyGrouped`."""
        if not self.inner.shape[1]:
            return rows.values.new_empty(len(rows.values), 0)
        return self._add_weights(multiply_grouped(rows.values, self.inner.mT, ends), weights)

    def forward(self, rows: RowRoom, small: Tensor, ends: Tensor) -> Tensor:
        """Return y [S, O] of x and its small product."""
        assert rows.float8 is not None
        result: Tensor = self.ops.multiply_quantized(
            rows.float8.quantized, self.weight.values, self.weight.scales, small, self.outer, ends
        )
        return result

    def backward(self, rows: RowRoom, ends: Tensor, *, needs_input: bool) -> tuple[Tensor, Tensor | None]:
        """Return g B and g b [S, C], and the gradient of x [S, H]."""
        assert rows.float8 is not None
        small = rows.values.new_empty(len(rows.values), 0)
        if self.outer.shape[2]:
            small = multiply_grouped(rows.values, self.outer, ends)
        return small, self._return_input(rows.float8.quantized, small, ends) if needs_input else None

    def _add_weights(self, small: Tensor, weights: Tensor | None) -> Tensor:
        """Fill in w, and return what it is filled into."""
        if self.has_bias:
            small[:, self.adapters.rank] = 1.0 if weights is None else weights.to(small.dtype)
        return small

    def _return_input(self, quantized: Quantized, small: Tensor, ends: Tensor) -> Tensor:
        """Return the gradient of x [S, H] of g s in float8."""
        turned = self.ops.turn_matrices(self.weight.values)
        result: Tensor = self.ops.multiply_quantized(quantized, turned, None, small, self.inner.mT, ends)
        return result


def quantize_experts(given: GroupedProjection) -> QuantizedExperts:
    """Return a projection with float8 weights; the given one, and the model, are left without theirs."""
    quantized = _build(given, _choose_operations(given.matrices), given.matrices)
    given.release()
    return quantized


def measure_products(given: GroupedProjection) -> float:
    """Return by what part the float8 products of the first experts differ from those in plain PyTorch, on this device.

    Zero where there are no kernels. The given projection keeps its weights.
    """
    matrices, ops = given.matrices[:_CHECKED_EXPERTS], _choose_operations(given.matrices)
    if ops is expert_float8:
        return 0.0
    generator = torch.Generator(matrices.device).manual_seed(0)
    ends = torch.arange(1, len(matrices) + 1, device=matrices.device, dtype=torch.int32) * _CHECKED_ROWS
    tokens = torch.arange(_CHECKED_ROWS, device=matrices.device).repeat(len(matrices))
    sides: list[tuple[Tensor, ...]] = []
    for operations in (ops, expert_float8):
        projection = _build(given, operations, matrices)
        generator.manual_seed(0)
        values = torch.randn(_CHECKED_ROWS, projection.num_in, generator=generator, device=matrices.device)
        outputs, small = projection.forward_tokens(values.to(matrices.dtype), tokens, ends, operations)
        grad = torch.randn(_CHECKED_ROWS, projection.num_out, generator=generator, device=matrices.device)
        sides.append((outputs, small, *projection.backward_tokens(grad.to(matrices.dtype), tokens, ends, operations)))
    pairs = [(found.double(), wanted.double()) for found, wanted in zip(*sides, strict=True) if wanted.numel()]
    return max(float((found - wanted).norm() / wanted.norm().clamp(min=1e-30)) for found, wanted in pairs)


def _build(given: GroupedProjection, ops: ModuleType, matrices: Tensor) -> QuantizedExperts:
    """Return a projection in float8 of the matrices M of some experts."""
    num_out, num_in, rank = given.num_out, given.num_in, given.adapters.rank
    weight = Quantized(*ops.quantize_matrices(matrices[:, :num_out, :num_in]))
    inner = matrices[:, num_out:, :num_in].clone(memory_format=torch.contiguous_format)
    outer = matrices[:, :num_out, num_in:].clone(memory_format=torch.contiguous_format)
    adapters = ExpertAdapters(given.adapters.part, inner[:, :rank], outer[:, :, :rank])
    return QuantizedExperts(weight, inner, outer, adapters, given.has_bias, ops)


def _choose_operations(like: Tensor) -> ModuleType:
    """Return the Triton kernels on a GPU that has Triton, else plain PyTorch."""
    if like.is_cuda:
        try:
            from tasks.decoder import expert_float8_kernels
        except ImportError:
            return expert_float8
        return expert_float8_kernels
    return expert_float8
