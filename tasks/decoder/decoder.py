"""The forward pass of a decoder-only transformer with LoRA, put together from fused blocks.

Dimensions: `T` tokens of a flat batch (examples end to end), `H` hidden size, `N` trained positions, `V` vocabulary.

`recognize_decoder` reads the layers of a model that transformers and PEFT have built. A model that it does not know in
every detail is refused, and the general engine trains it. The parameters stay where they are: an adapter trained here
is PEFT's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.decoder import elementwise
from tasks.decoder.adapters import AdapterGroup, bind_gradients, refresh
from tasks.decoder.attention import Attention, Segments
from tasks.decoder.blocks import (
    GatedProject,
    Norm,
    NormProject,
    OutputNorm,
    Project,
    Rotate,
    Select,
    last_output_unused,
)
from tasks.decoder.dropout import Dropout
from tasks.decoder.elementwise import Heads
from tasks.decoder.head import HeadLoss
from tasks.decoder.projections import AnyProjection

# Bytes of logits that exist at a time.
LOGITS_BYTES = 1 << 30


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    input_norm: Norm
    qkv: AnyProjection
    heads: Heads
    head_norms: tuple[Norm | None, Norm | None]
    """Of queries and keys."""
    rope: str
    """Which of the model's angles: the layer's type, or "" where there is one for all."""
    window: int | None
    attention_scale: float
    output: AnyProjection
    attention_out_norm: Norm | None
    """Before the attention's output joins the stream (Gemma)."""
    gate_norm: Norm
    gate_up: AnyProjection
    activation: str
    down: AnyProjection
    gate_out_norm: Norm | None

    @property
    def projections(self) -> tuple[AnyProjection, ...]:
        """All four groups."""
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True)
class Decoder:
    """A recognized model."""

    embed: Callable[[Tensor], Tensor]
    """[T] -> [T, H]"""
    angles: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]
    """(states, positions [T], rope) -> cos, sin [T, D / 2]"""
    layers: tuple[Layer, ...]
    norm: Norm
    head: nn.Linear
    attend: Attention
    ops: ModuleType
    """`elementwise`, or `kernels` on a GPU with Triton."""
    dropout: Dropout | None = None
    """Of the adapter, where gradients are taken."""

    def invalidate(self) -> None:
        """Say that the trained matrices have changed."""
        for group in self._groups():
            group.invalidate()

    def refresh(self) -> None:
        """Bring the working copies of the trained matrices up to date; cheap when nothing has changed."""
        refresh(self._groups(), getattr(self.ops, "copy_matrices", None))

    def bind_gradients(self) -> Tensor | None:
        """Give the trained matrices gradients that stay where they are; see `adapters.bind_gradients`."""
        return bind_gradients(self._groups())

    def has_bound_gradients(self) -> bool:
        """Say whether passes add to gradients in place."""
        return any(group.grad_a is not None for group in self._groups())

    def _groups(self) -> list[AdapterGroup]:
        return [projection.adapters for layer in self.layers for projection in layer.projections]


def compute_losses(
    decoder: Decoder,
    input_ids: Tensor,
    positions: Tensor,
    segments: Segments,
    trained: Tensor,
    targets: Tensor,
    *,
    num_recomputed: int = 0,
    logits_bytes: int = LOGITS_BYTES,
) -> Tensor:
    """Return -log p(target) of the trained positions [N] (nats, fp32); 0 where a target does not count.

    Their weights come with the backward pass. The adapter drops where gradients are taken, by the key that
    `decoder.dropout` holds, backward pass included.

    Args:
        decoder: with its working copies refreshed.
        input_ids: [T]
        positions: [T], from 0 in each example.
        segments: the examples' borders.
        trained: [N] distinct indices into T, at least one.
        targets: [N] token ids; one below 0 does not count.
        num_recomputed: layers, from the first, that keep only their input and run again in the backward pass.
        logits_bytes: that exist at a time.
    """
    stream, delta, source = decoder.embed(input_ids), None, None
    dropout = decoder.dropout if torch.is_grad_enabled() else None
    key = None if dropout is None else dropout.key
    ropes = {layer.rope: decoder.angles(stream, positions, layer.rope) for layer in decoder.layers}
    for number, layer in enumerate(decoder.layers):
        select = trained if number == len(decoder.layers) - 1 else None
        run = partial(_run_layer, layer, decoder.ops, dropout, decoder.attend, segments, *ropes[layer.rope], select)
        if number < num_recomputed and torch.is_grad_enabled():
            stream = stream if delta is None else stream + delta
            contexts = partial(_open_contexts, is_unused=layer.gate_out_norm is None)
            stream, delta = checkpoint(
                run, stream, None, None, key, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
            )
        else:
            stream, delta = run(stream, delta, source, key)
        source = layer.down if layer.gate_out_norm is None else None
    weight = decoder.head.weight
    chunk = max(64, logits_bytes // (weight.shape[0] * weight.element_size()))
    losses: Tensor = HeadLoss.apply(
        stream, delta, source, targets, decoder.norm, _Head(decoder.head), chunk, decoder.ops
    )
    return losses


def _open_contexts(*, is_unused: bool) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a layer's first run and of its second."""
    return nullcontext(), last_output_unused() if is_unused else nullcontext()


class _Head:
    """The frozen output head."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits [N, V]."""
        bias = self.module.bias
        weight = self.module.weight.t()
        return torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient [N, H] of the rows."""
        return torch.mm(grad, self.module.weight)


def _run_layer(
    layer: Layer,
    ops: ModuleType,
    dropout: Dropout | None,
    attend: Attention,
    segments: Segments,
    cos: Tensor,
    sin: Tensor,
    select: Tensor | None,
    stream: Tensor,
    delta: Tensor | None,
    source: AnyProjection | None,
    key: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the stream after the attention, and what the gated layer adds to it.

    Args:
        layer: its parts.
        ops: of the work between the products.
        dropout: of the adapter.
        attend: the attention.
        segments: the examples' borders.
        cos: of the positions' angles.
        sin: likewise.
        select: the only positions that are wanted; None: all.
        stream: [T, H]
        delta: [T, H], added first.
        source: the projection that made delta.
        key: of dropout, for `checkpoint` alone: it refuses to run the layer again once an argument has changed.
    """
    stream, qkv = NormProject.apply(
        stream, delta, source, layer.input_norm, layer.qkv, ops, dropout, *layer.qkv.adapters.parameters
    )
    queries, keys, values = Rotate.apply(qkv, layer.qkv, layer.heads, cos, sin, layer.head_norms, ops)
    attended = attend(queries, keys, values, segments, scale=layer.attention_scale, window=layer.window).flatten(1)
    if select is not None:
        stream, attended = Select.apply(stream, attended, select)
    delta = Project.apply(attended, layer.output, ops, dropout, *layer.output.adapters.parameters)
    source = layer.output
    if layer.attention_out_norm is not None:
        delta, source = OutputNorm.apply(delta, source, layer.attention_out_norm, ops), None
    stream, gate_up = NormProject.apply(
        stream, delta, source, layer.gate_norm, layer.gate_up, ops, dropout, *layer.gate_up.adapters.parameters
    )
    parameters = layer.down.adapters.parameters
    delta = GatedProject.apply(gate_up, layer.gate_up, layer.activation, layer.down, ops, dropout, *parameters)
    if layer.gate_out_norm is not None:
        delta = OutputNorm.apply(delta, layer.down, layer.gate_out_norm, ops)
    return stream, delta


def choose_operations(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the Triton kernels on a GPU that has Triton and a dtype below fp64, else plain PyTorch."""
    if device.type == "cuda" and dtype != torch.float64:
        try:
            from tasks.decoder import kernels
        except ImportError:
            return elementwise
        return kernels
    return elementwise
