"""The LoRA matrices of linear layers that share an input, as two joint matrices in the working dtype.

Dimensions: `T` tokens, `H` inputs, `O` outputs of all layers of the group, `R` their ranks together.

    A [R, H]: the layers' A, one below the other        B [O, R]: the layers' s B as blocks on the diagonal

The trained matrices stay where PEFT has them, in fp32; the joint ones are copies of them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tasks.decoder.grouped import ExpertAdapters


@dataclass(frozen=True)
class Part:
    """One linear layer of a group."""

    module: nn.Linear
    """Frozen."""
    lora_a: nn.Parameter | None
    """[r, H]; None where the layer has no adapter."""
    lora_b: nn.Parameter | None
    """[O of the layer, r]"""
    scale: float
    """s: alpha / r, or alpha / sqrt(r) for rsLoRA."""


@dataclass
class AdapterGroup:
    """Where each layer's matrices lie in the joint ones, and whether those are up to date."""

    parts: tuple[Part, ...]
    outs: tuple[slice, ...]
    """Of each layer in O."""
    ranks: tuple[slice, ...]
    """Of each layer in R; empty without an adapter."""
    joint_a: Tensor
    """[R, H]"""
    joint_b: Tensor
    """[O, R], zero off the blocks."""
    versions: list[int] = field(default_factory=list)
    """Of the trained matrices when they were last copied."""
    grad_a: Tensor | None = None
    """[R, H]: the gradients of all A, where they are added to in place; see `bind_gradients`."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained, A before B, layer by layer."""
        return tuple(p for part in self.parts for p in (part.lora_a, part.lora_b) if p is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the joint matrices."""
        return self.joint_a.dtype

    @property
    def is_bound(self) -> bool:
        """Passes add to the gradients in place."""
        return self.grad_a is not None

    def bind(self, flat: Tensor, start: int) -> int:
        """Take the gradients' place in one vector of zeros, from `start` on, those of all A first; return its end."""
        all_a = [part.lora_a for part in self.parts if part.lora_a is not None]
        all_b = [part.lora_b for part in self.parts if part.lora_b is not None]
        self.grad_a = flat[start : start + sum(a.numel() for a in all_a)].view(-1, self.joint_a.shape[1])
        for parameter in (*all_a, *all_b):
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return start

    def invalidate(self) -> None:
        """Say that the trained matrices have changed: fused optimizers change them behind autograd's back."""
        self.versions = []

    def compute_grads(self, grads: Tensor, small: Tensor, inputs: Tensor, projected: Tensor) -> list[Tensor | None]:
        """Return the gradients of `parameters`, in fp32 where those are; none where they were added in place.

        Args:
            grads: g [T, O] (further columns are not read).
            small: g B [T, R].
            inputs: x [T, H].
            projected: x A' [T, R].
        """
        if not self.joint_a.shape[0]:
            return []
        if self.grad_a is not None:
            add_product(self.grad_a, small.t(), inputs, 1.0)
            for part, out, rank in zip(self.parts, self.outs, self.ranks, strict=True):
                if part.lora_b is not None and part.lora_b.grad is not None:
                    add_product(part.lora_b.grad, grads[:, out].t(), projected[:, rank], part.scale)
            return [None] * len(self.parameters)
        joint = multiply_wide(small.t(), inputs)
        results: list[Tensor | None] = []
        for part, out, rank in zip(self.parts, self.outs, self.ranks, strict=True):
            if part.lora_a is not None:
                results.append(joint[rank])
                results.append(multiply_wide(grads[:, out].t(), projected[:, rank]).mul_(part.scale))
        return results


AnyAdapters = AdapterGroup | ExpertAdapters


class Copy(NamedTuple):
    """A trained matrix and its place in a joint one."""

    source: Tensor
    """[rows, columns], contiguous"""
    target: Tensor
    """[rows, columns], its rows further apart"""
    scale: float


@torch.no_grad()
def refresh(groups: Iterable[AnyAdapters], copy_all: Callable[[Sequence[Copy]], None] | None = None) -> bool:
    """Copy the trained matrices of all groups that are stale; say whether there were any.

    Args:
        groups: of the decoder.
        copy_all: does all copies in one call; None: PyTorch's own calls for many tensors.
    """
    changed = [group for group in groups if group.versions != read_versions(group.parameters)]
    stale = [group for group in changed if isinstance(group, AdapterGroup)]
    pieces = [
        (group.joint_a[rank], part.lora_a, group.joint_b[out, rank], part.lora_b, part.scale)
        for group in stale
        for part, out, rank in zip(group.parts, group.outs, group.ranks, strict=True)
        if part.lora_a is not None and part.lora_b is not None
    ]
    if pieces and copy_all is not None:
        copy_all([copy for to_a, a, to_b, b, scale in pieces for copy in (Copy(a, to_a, 1.0), Copy(b, to_b, scale))])
    elif pieces:
        to_a, from_a, to_b, from_b, scales = (list(column) for column in zip(*pieces, strict=True))
        torch._foreach_copy_(to_a, from_a)
        if all(math.frexp(scale)[0] == 0.5 for scale in scales):  # a power of two: exact after the rounding as well
            torch._foreach_copy_(to_b, from_b)
            torch._foreach_mul_(to_b, scales)
        else:
            torch._foreach_copy_(to_b, torch._foreach_mul(from_b, scales))
    for group in changed:
        if isinstance(group, ExpertAdapters):
            group.copy()
        group.versions = read_versions(group.parameters)
    return bool(changed)


def read_versions(parameters: Iterable[Tensor]) -> list[int]:
    """Return how often each was changed in place, as far as autograd has seen it."""
    return [parameter._version for parameter in parameters]


def bind_gradients(groups: Iterable[AnyAdapters]) -> Tensor | None:
    """Give the trained matrices gradients of zero that lie end to end, and have passes add to them in place.

    One product then makes the gradients of all A of a group, and neither a product's result nor its sum with what is
    there takes a pass of its own.

    Returns:
        All gradients in one vector; None, and nothing is changed, where the matrices are of several dtypes or devices,
        or the device cannot add a product of 16-bit factors to an fp32 matrix.
    """
    groups = [group for group in groups if group.parameters]
    parameters = [parameter for group in groups for parameter in group.parameters]
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) != 1:
        return None
    dtype, device = kinds.pop()
    if not can_add_products(groups[0].dtype, dtype, device):
        return None
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=dtype, device=device)
    start = 0
    for group in groups:
        start = group.bind(flat, start)
    return flat


def lay_out(sizes: Sequence[int]) -> tuple[slice, ...]:
    """Return slices of the given sizes, end to end."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))


def join_biases(parts: Sequence[Part], dtype: torch.dtype | None = None) -> Tensor | None:
    """Return the biases [O] end to end, zeros where a layer has none; None where no layer has one."""
    if all(part.module.bias is None for part in parts):
        return None
    sizes = [part.module.out_features for part in parts]
    weight = parts[0].module.weight
    biases = [part.module.bias for part in parts]
    joint = [weight.new_zeros(n) if b is None else b.data for b, n in zip(biases, sizes, strict=True)]
    return torch.cat([bias.to(dtype or weight.dtype) for bias in joint])


def multiply_wide(left: Tensor, right: Tensor) -> Tensor:
    """Multiply, with an fp32 result of 16-bit factors."""
    if left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def add_product(target: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale * left @ right to the target, which may be wider than the factors."""
    if left.dtype == target.dtype:
        target.addmm_(left, right, alpha=scale)
    elif left.is_cuda:
        torch.addmm(target, left, right, out_dtype=target.dtype, alpha=scale, out=target)
    else:
        target.addmm_(left.to(target.dtype), right.to(target.dtype), alpha=scale)


def can_add_products(narrow: torch.dtype, wide: torch.dtype, device: torch.device) -> bool:
    """Try `add_product` out on small whole numbers, whose sums are exact."""
    generator = torch.Generator().manual_seed(0)
    left, right, target = (torch.randint(-3, 4, (16, 16), generator=generator) for _ in range(3))
    found = target.to(device, wide)
    try:
        add_product(found, left.to(device, narrow).t(), right.to(device, narrow), 2.0)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(found.cpu().double(), target.double() + 2.0 * (left.double().t() @ right.double()))
