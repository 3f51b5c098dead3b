"""Forward and backward passes of small batches, recorded by shape and replayed: a GPU must not wait for the host.

Dimensions: `T` tokens, `N` trained positions, `S` segments, each after rounding up.

A pass over 2,000 tokens of a small model is some two thousand kernels of a few microseconds each, and the host takes
ten times as long to launch them as the GPU to run them. So a small batch is filled up to one of a few shapes, and the
kernels of a shape are launched together. The shape depends on the batch alone: a step has the same numbers whatever was
recorded before it, also after a resume. What is filled up attends to itself only, and nothing of it is learned.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.decoder.attention import LARGEST_HEAD, Segments, attend_flash4, attend_varlen
from tasks.decoder.decoder import Decoder, compute_losses
from tasks.decoder.mixers import list_attentions
from tasks.decoder.recording import Recorder

MOST_TOKENS = 8192
"""Of a recorded pass: above, the host is ahead of any GPU."""
_LAUNCH_SECONDS = 0.002
"""Of a layer's launches, forward and backward, less than measured: a pass that takes longer need not be recorded."""
_FLOP_PER_SECOND = 6e14
"""Of a fast GPU. A constant, so that a step's shapes are the same on every GPU."""
_IGNORED = -1  # a target that does not count
_LEAST_TOKENS = 256
_LEAST_TRAINED = 64
_SEGMENTS_STEP = 8


class Shape(NamedTuple):
    """Sizes of a filled up batch."""

    num_tokens: int
    num_trained: int
    num_segments: int


class FlatBatch(NamedTuple):
    """A flat batch on the host."""

    input_ids: Tensor
    """[T] int64"""
    positions: Tensor
    """[T] int64, from 0 in each segment."""
    lengths: tuple[int, ...]
    """Of the segments; they sum to T."""
    trained: Tensor
    """[N] int64, distinct positions"""
    targets: Tensor
    """[N] int64; one below 0 does not count."""


class RecordingRule(NamedTuple):
    """Which passes are recorded, and what each is filled up to."""

    most_tokens: int
    """Of a recorded pass."""
    longest: int
    """Tokens that no segment exceeds."""
    room_tokens: int
    """Whose pass fits into the memory."""

    def choose(self, num_tokens: int, num_trained: int, num_segments: int) -> Shape | None:
        """Return the shape of a pass that is recorded; None of one that is not."""
        shape = choose_shape(num_tokens, num_trained, num_segments, longest=self.longest)
        # What is recorded keeps its memory, beside that of the passes which are not.
        return None if shape.num_tokens > self.most_tokens or 2 * shape.num_tokens > self.room_tokens else shape


def count_recorded(num_layers: int, flop_per_token: float) -> int:
    """Return the most tokens of a pass that is worth recording: its products take less time than their launches.

    Filling up costs tokens, so that a large model's passes are better left as they are.

    Args:
        num_layers: of the model.
        flop_per_token: of the products with its layers' own weights, forward and backward.
    """
    return min(MOST_TOKENS, int(num_layers * _LAUNCH_SECONDS * _FLOP_PER_SECOND / flop_per_token))


def count_flop(decoder: Decoder) -> int:
    """Return the FLOP of a token in the products with its layers' own weights, forward and backward."""
    flop_per_weight = 4 if decoder.weights is None else 6  # the gradient of a trained one takes as much again
    return flop_per_weight * sum(layer.num_weights for layer in decoder.layers)


def round_longest(longest: int) -> int:
    """Return one number for all shapes: attention needs an upper bound only, and each is a recording of its own."""
    return max(64, -(-longest // 64) * 64)


def choose_shape(num_tokens: int, num_trained: int, num_segments: int, *, longest: int) -> Shape:
    """Return the shape that a batch is filled up to: at most a quarter more tokens, or 256, and as many more targets.

    Args:
        num_tokens: of the batch.
        num_trained: positions.
        num_segments: of the batch.
        longest: most tokens of a segment, at least 8.
    """
    tokens = _round_up(num_tokens + _SEGMENTS_STEP)
    part = max(_LEAST_TRAINED, tokens // 4)
    trained = min(-(-num_trained // part) * part, tokens)
    # The rest becomes segments of its own, none of them empty and none longer than the longest.
    least = num_segments + -(-(tokens - num_tokens) // longest)
    return Shape(tokens, trained, -(-least // _SEGMENTS_STEP) * _SEGMENTS_STEP)


def fill_up(batch: FlatBatch, shape: Shape) -> FlatBatch:
    """Return a batch of the shape with the same sum of losses and the same gradient."""
    num_tokens, num_trained = len(batch.input_ids), len(batch.trained)
    room, count = shape.num_tokens - num_tokens, shape.num_segments - len(batch.lengths)
    fillers = [room // count + (number < room % count) for number in range(count)]
    positions = np.concatenate([np.arange(length) for length in fillers])
    is_free = np.ones(shape.num_tokens, bool)
    is_free[batch.trained.numpy()] = False
    others = np.flatnonzero(is_free)[: shape.num_trained - num_trained]
    return FlatBatch(
        input_ids=torch.cat([batch.input_ids, batch.input_ids.new_zeros(room)]),
        positions=torch.cat([batch.positions, torch.from_numpy(positions)]),
        lengths=(*batch.lengths, *fillers),
        trained=torch.cat([batch.trained, torch.from_numpy(others)]),
        targets=torch.cat([batch.targets, batch.targets.new_full((len(others),), _IGNORED)]),
    )


@dataclass
class _Place:
    """Where a shape's batches lie on the device: one buffer of int64, so that a batch is one copy."""

    buffer: Tensor
    input_ids: Tensor
    positions: Tensor
    trained: Tensor
    targets: Tensor
    borders: Tensor
    scale: Tensor
    """[] fp32"""
    loss: Tensor
    """[] fp32: written by the pass."""


class PassRecorder:
    """Adds the gradient of small flat batches to that of what is trained, and keeps the decoder's working copies fresh.

    The decoder's gradients must be bound, so that they stay where they are.
    """

    def __init__(self, decoder: Decoder, device: torch.device, *, longest: int, logits_bytes: int) -> None:
        self.most_tokens = count_recorded(len(decoder.layers), count_flop(decoder))
        self._decoder = decoder
        self._device = device
        self.longest = round_longest(longest)
        self._logits_bytes = logits_bytes
        self._recorder = Recorder(device)
        self._places: dict[Shape, _Place] = {}

    def choose_shape(self, batch: FlatBatch) -> Shape:
        """Return the shape that a batch would have."""
        sizes = len(batch.input_ids), len(batch.trained), len(batch.lengths)
        return choose_shape(*sizes, longest=self.longest)

    def add_gradient(self, batch: FlatBatch, scale: float, *, dropout_key: int = 0) -> Tensor:
        """Add the gradient of scale * (sum of the batch's token losses); return that sum (nats, fp32 scalar)."""
        shape = self.choose_shape(batch)
        place = self._places.get(shape) or self._make_place(shape)
        place.buffer.copy_(_lay_out(fill_up(batch, shape), scale).pin_memory(), non_blocking=True)
        if self._decoder.dropout is not None:
            self._decoder.dropout.start_forward(dropout_key)
        self._decoder.refresh()
        self._recorder.run(shape, lambda: self._do_pass(place))
        return place.loss.clone()

    def _do_pass(self, place: _Place) -> None:
        losses = compute_losses(
            self._decoder,
            place.input_ids,
            place.positions,
            Segments(place.borders, (self.longest,)),
            place.trained,
            place.targets,
            logits_bytes=self._logits_bytes,
            scale=place.scale if self._decoder.list_head_parameters() else None,
        )
        loss = losses.sum()
        (loss * place.scale).backward()
        place.loss.copy_(loss.detach())

    def _make_place(self, shape: Shape) -> _Place:
        tokens, trained, segments = shape
        sizes = (tokens, tokens, trained, trained, _count_words(segments + 1), 1)
        buffer = torch.zeros(sum(sizes), dtype=torch.int64, device=self._device)
        ids, positions, rows, targets, borders, scale = buffer.split(sizes)
        place = _Place(
            buffer, ids, positions, rows, targets,
            borders.view(torch.int32)[: segments + 1], scale.view(torch.float32)[0],
            torch.zeros((), device=self._device),
        )  # fmt: skip
        self._places[shape] = place
        return place


def can_record(decoder: Decoder, device: torch.device) -> bool:
    """Say whether a decoder's passes depend on nothing but their shapes: attention that reads borders on the device."""
    if device.type != "cuda" or decoder.attend not in (attend_varlen, attend_flash4) or decoder.has_delta_nets:
        return False
    return all(heads.size <= LARGEST_HEAD for heads in list_attentions(layer.mixer for layer in decoder.layers))


def _lay_out(batch: FlatBatch, scale: float) -> Tensor:
    """Return a batch as a place's buffer holds it."""
    borders = np.zeros(2 * _count_words(len(batch.lengths) + 1), np.int32)
    borders[1 : len(batch.lengths) + 1] = np.cumsum(batch.lengths)
    factor = np.array([scale, 0.0], np.float32)
    tail = [torch.from_numpy(values.view(np.int64)) for values in (borders, factor)]
    return torch.cat([batch.input_ids, batch.positions, batch.trained, batch.targets, *tail])


def _count_words(num_int32: int) -> int:
    """Return how many int64 hold so many int32."""
    return -(-num_int32 // 2)


def _round_up(num_tokens: int) -> int:
    """Return the next of four sizes between a power of two and the next one."""
    step = max(64, 1 << max(0, (num_tokens - 1).bit_length() - 3))
    return max(_LEAST_TOKENS, -(-num_tokens // step) * step)
