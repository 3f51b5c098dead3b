"""The frozen weights in float8, for products at twice the speed of bf16 ones; the adapter stays in bf16.

Dimensions: `T` tokens, `H` inputs, `O` outputs of all layers of a group, `R` their ranks together.

The base is frozen, so its weights are quantized once: by output row for the forward product, and by input row,
transposed, for the input gradient (Hopper's float8 products want both factors along their rows). Activations and
gradients are quantized by token, in the kernel that makes them where there is one. One scale a row keeps an outlier
from costing other rows their precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.decoder.adapters import AdapterGroup, Part, join_biases, lay_out
from tasks.decoder.elementwise import Quantized
from tasks.decoder.kernels import quantize_rows
from tasks.decoder.projections import Input

FLOAT8 = torch.float8_e4m3fn


@dataclass
class QuantizedProjection:
    """A group of linear layers with float8 weights; a `projections.AnyProjection`."""

    weight: Quantized
    """[O, H]"""
    turned: Quantized
    """[H, O]: the transpose, quantized by its own rows."""
    bias: Tensor | None
    """[O]"""
    adapters: AdapterGroup
    site: int
    expected: tuple[int, Quantized] | None = None
    """Address of the gradient last allocated, and its float8 copy."""

    def allocate_input(self, num_tokens: int, *, drops: bool = False) -> Input:
        """Return room for x and its float8 copy."""
        joint_a = self.adapters.joint_a
        width = joint_a.shape[1]
        joint = joint_a.new_empty(num_tokens, width + joint_a.shape[0])
        dropped = joint.new_empty(num_tokens, width) if drops and joint_a.shape[0] else None
        return Input(joint, joint[:, :width], joint[:, width:], _allocate(joint, width), dropped)

    def allocate_grad(self, num_tokens: int) -> tuple[Tensor, Quantized]:
        """Return room for g and its float8 copy."""
        joint_b = self.adapters.joint_b
        grad = joint_b.new_empty(num_tokens, joint_b.shape[0])
        quantized = _allocate(grad, joint_b.shape[0])
        self.expected = grad.data_ptr(), quantized
        return grad, quantized

    def forget_grad(self) -> None:
        """The next gradient comes without its float8 copy."""
        self.expected = None

    def forward_values(self, values: Tensor, inputs: Input) -> Tensor:
        """Quantize x, and go on as `forward` without copying it."""
        return self.forward(inputs._replace(values=values, quantized=Quantized(*quantize_rows(values))))

    def project_small(self, inputs: Input) -> None:
        """Fill in x A'."""
        if inputs.projected.shape[1]:
            torch.mm(inputs.adapted, self.adapters.joint_a.t(), out=inputs.projected)

    def forward(self, inputs: Input) -> Tensor:
        """Fill in x A' and return y [T, O] bf16."""
        self.project_small(inputs)
        assert inputs.quantized is not None
        outputs = _multiply(inputs.quantized, self.weight, self.bias)
        return outputs.addmm_(inputs.projected, self.adapters.joint_b.t()) if inputs.projected.shape[1] else outputs

    def backward(
        self, grad: Tensor, *, needs_input: bool, drops: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return g B [T, R] and the gradient of x [T, H]; where the adapter drops, that of the masked copy apart."""
        small = torch.mm(grad, self.adapters.joint_b)
        expected, self.expected = self.expected, None
        if not needs_input:
            return small, None, None
        is_same = expected is not None and expected[0] == grad.data_ptr() and len(expected[1].values) == len(grad)
        quantized = expected[1] if expected is not None and is_same else Quantized(*quantize_rows(grad))
        result = _multiply(quantized, self.turned, None)
        if not small.shape[1]:
            return small, result, None
        if drops:
            return small, result, torch.mm(small, self.adapters.joint_a)
        return small, result.addmm_(small, self.adapters.joint_a), None


def build_quantized_projection(parts: Sequence[Part], site: int = 0) -> QuantizedProjection:
    """Quantize the parts' weights; the modules are left without theirs, so that the memory is free."""
    weight = torch.cat([part.module.weight.data for part in parts])
    ranks = [0 if part.lora_a is None else part.lora_a.shape[0] for part in parts]
    bias = join_biases(parts)
    outs = lay_out([part.module.weight.shape[0] for part in parts])
    for part in parts:
        part.module.weight.data = weight.new_empty(0)
    joint_a = weight.new_zeros(sum(ranks), weight.shape[1])
    joint_b = weight.new_zeros(weight.shape[0], sum(ranks))
    adapters = AdapterGroup(tuple(parts), outs, lay_out(ranks), joint_a, joint_b)
    turned = Quantized(*quantize_rows(weight.t().contiguous()))
    return QuantizedProjection(Quantized(*quantize_rows(weight)), turned, bias, adapters, site)


def _allocate(like: Tensor, width: int) -> Quantized:
    rows = like.shape[0]
    return Quantized(like.new_empty(rows, width, dtype=FLOAT8), like.new_empty(rows, 1, dtype=torch.float32))


def _multiply(left: Quantized, right: Quantized, bias: Tensor | None) -> Tensor:
    """Return left [T, K] times the transpose of right [O, K] in bf16."""
    return torch._scaled_mm(
        left.values,
        right.values.t(),
        left.scales,
        right.scales.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
