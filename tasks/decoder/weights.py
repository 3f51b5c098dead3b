"""The decoder's own weights where they are trained: their working copies, and where their gradients go.

Dimensions: `T` tokens, `H` inputs, `O` outputs of all layers of a group, `V` vocabulary.

What is trained stays with its module, in fp32 where the training is in 16 bits; products take copies in the working
dtype, made anew after each step. In the working dtype already, a matrix is its own copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder.adapters import Part, add_product, can_add_products, multiply_wide, read_versions


class WorkingCopy(NamedTuple):
    """A tensor that follows a parameter: (parameter + shift) * factor."""

    parameter: Tensor
    target: Tensor
    shift: float = 0.0
    factor: float = 1.0


@dataclass
class TrainedWeights:
    """All trained weights of a decoder."""

    dtype: torch.dtype
    """Of the products."""
    parameters: list[Tensor] = field(default_factory=list)
    """Each once, though it may be tied; those of a group one after the other."""
    copies: list[WorkingCopy] = field(default_factory=list)
    groups: list["WeightGroup"] = field(default_factory=list)
    flat: Tensor | None = None
    """All gradients end to end, where they are added to in place."""
    versions: list[int] = field(default_factory=list)
    """Of the parameters when they were last copied."""

    def add(self, parameter: Tensor) -> None:
        """Note a trained parameter."""
        if not any(parameter is known for known in self.parameters):
            self.parameters.append(parameter)

    def check(self, model: nn.Module) -> None:
        """Make sure that nothing of a model is trained which is not here."""
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert trained == {id(parameter) for parameter in self.parameters}

    def follow(self, parameter: Tensor, target: Tensor, *, shift: float = 0.0, factor: float = 1.0) -> None:
        """Keep a tensor up to date with a parameter."""
        self.copies.append(WorkingCopy(parameter, target, shift, factor))

    def invalidate(self) -> None:
        """Say that the parameters have changed: fused optimizers change them behind autograd's back."""
        self.versions = []

    @torch.no_grad()
    def refresh(self) -> bool:
        """Bring the working copies up to date, and say whether anything has changed; cheap when nothing has."""
        versions = read_versions(self.parameters)
        if self.versions == versions:
            return False
        for parameter, target, shift, factor in self.copies:
            is_plain = shift == 0.0 and factor == 1.0
            target.copy_(parameter if is_plain else (parameter + shift) * factor)
        self.versions = versions
        return True

    def bind(self) -> Tensor | None:
        """Give the parameters gradients of zero that lie end to end, and have passes add to them in place.

        Returns:
            All gradients in one vector, the same one when asked again; None, and nothing is changed, where the
            parameters are of several dtypes or devices, or the device cannot add products to them.
        """
        if self.flat is not None:
            return self.flat
        kinds = {(parameter.dtype, parameter.device) for parameter in self.parameters}
        if len(kinds) != 1:
            return None
        dtype, device = kinds.pop()
        if not can_add_products(self.dtype, dtype, device):
            return None
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=dtype, device=device)
        start = 0
        for parameter in self.parameters:
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        for group in self.groups:
            group.bind()
        return self.flat

    def release(self) -> None:
        """Let go of gradients that stay where they are."""
        self.flat = None
        for parameter in self.parameters:
            parameter.grad = None
        for group in self.groups:
            group.grad = None

    def give(self, parameter: Tensor, grad: Tensor) -> Tensor | None:
        """Add a gradient where gradients stay, or return it for autograd to add."""
        if self.flat is None:
            return grad.to(parameter.dtype)
        assert parameter.grad is not None
        parameter.grad.add_(grad)
        return None

    def give_product(self, parameter: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
        """Add left @ right to a gradient, or return it."""
        if self.flat is None:
            return multiply_wide(left, right)
        assert parameter.grad is not None
        add_product(parameter.grad, left, right, 1.0)
        return None


@dataclass
class WeightGroup:
    """Trained linear layers that share an input; beside `adapters.AdapterGroup`."""

    parts: tuple[Part, ...]
    outs: tuple[slice, ...]
    """Of each layer in O."""
    joint_a: Tensor
    """[0, H]: there is no adapter."""
    joint_b: Tensor
    """[O, 0]"""
    weights: TrainedWeights
    grad: Tensor | None = None
    """[O, H]: the gradients of all weights, where they stay and all are trained."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What is trained now, weight before bias, layer by layer."""
        return tuple(parameter for _, parameter in self._list_trained())

    def compute_grads(self, grads: Tensor, small: Tensor, inputs: Tensor, projected: Tensor) -> list[Tensor | None]:
        """Return the gradients of `parameters`, in their dtype; None where they were added in place.

        Args:
            grads: g [T, O] (further columns are not read).
            small: not read.
            inputs: x [T, H].
            projected: not read.
        """
        trained = list(self._list_trained())
        is_joint = self.grad is not None and all(part.module.weight.requires_grad for part in self.parts)
        if is_joint:
            assert self.grad is not None
            add_product(self.grad, grads[:, : self.outs[-1].stop].t(), inputs, 1.0)
        results: list[Tensor | None] = []
        for out, parameter in trained:
            if parameter.dim() == 1:
                results.append(self.weights.give(parameter, grads[:, out].sum(0, dtype=parameter.dtype)))
            elif is_joint:
                results.append(None)
            else:
                results.append(self.weights.give_product(parameter, grads[:, out].t(), inputs))
        return results

    def bind(self) -> None:
        """Find the gradients of all weights as one matrix, if they lie so."""
        matrices = [part.module.weight for part in self.parts]
        grads = [matrix.grad for matrix in matrices if matrix.requires_grad and matrix.grad is not None]
        ends = [grad.data_ptr() + grad.numel() * grad.element_size() for grad in grads]
        is_whole = len(grads) == len(matrices) and ends[:-1] == [grad.data_ptr() for grad in grads[1:]]
        if is_whole:
            rows, columns = sum(grad.shape[0] for grad in grads), grads[0].shape[1]
            self.grad = grads[0].as_strided((rows, columns), (columns, 1))

    def _list_trained(self) -> Iterator[tuple[slice, Tensor]]:
        for part, out in zip(self.parts, self.outs, strict=True):
            for parameter in (part.module.weight, part.module.bias):
                if parameter is not None and parameter.requires_grad:
                    yield out, parameter


class Embedding:
    """Rows of an embedding [V, H] in the working dtype, times a factor."""

    def __init__(self, module: nn.Embedding, weights: TrainedWeights, factor: float) -> None:
        self.module = module
        self.weights = weights
        self.factor = factor

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Look rows up: [T] -> [T, H]."""
        rows: Tensor = _Lookup.apply(input_ids, self, self.module.weight)
        return rows


class _Lookup(torch.autograd.Function):
    """[T] -> [T, H] of an `Embedding`."""

    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, embedding: Embedding, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.embedding = embedding
        return (F.embedding(input_ids, weight) * embedding.factor).to(embedding.weights.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (input_ids,) = ctx.saved_tensors
        module, weights, factor = ctx.embedding.module, ctx.embedding.weights, ctx.embedding.factor
        rows = grad.to(module.weight.dtype) * factor
        if module.padding_idx is not None:  # PyTorch's own never learns from it
            rows.masked_fill_((input_ids == module.padding_idx)[:, None], 0.0)
        is_bound = weights.flat is not None
        target = module.weight.grad if is_bound else torch.zeros_like(module.weight)
        target.index_add_(0, input_ids, rows)
        return None, None, None if is_bound else target
