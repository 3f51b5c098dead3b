"""A model's forward pass over tokens that lie end to end, with an attention of ours in place of the model's.

Dimensions: `T` tokens of a flat input, `N` kept positions, `V` vocabulary, `D` head size.

Any model of transformers whose layers call the attention that its config names can be run so; its other layers are not
touched. A layout, handed to every layer beside the hidden states, says which tokens attend to which.
"""

import inspect
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from tasks.decoder.attention import Segments, attend
from tasks.families.packing import find_row_limit

_NAME = "sft_flat"
# What some models add to the scores; a layout knows nothing of it.
_UNKNOWN_TERMS = ("softcap", "s_aux", "position_bias")
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Rotary angles that depend on the longest row of an input: a row would not be alone with itself.
_CHANGING_ROPES = {"dynamic", "longrope"}


class UnsupportedModelError(ValueError):
    """The model cannot be run flat; the message says why."""


class RowLayout(Protocol):
    """Who attends to whom."""

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """Return the attention [T, heads, D] of queries [T, heads, D], keys and values [T, fewer heads, D]."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows end to end, each alone with itself."""

    segments: Segments

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """Attend causally in each row."""
        return attend(queries, keys, values, self.segments, scale=scale, window=window)


@dataclass(frozen=True)
class FlatInput:
    """Rows end to end."""

    input_ids: Tensor
    """[T]"""
    positions: Tensor
    """[T], from 0 in each row."""
    segments: Segments


def lay_flat(rows: Sequence[Sequence[int]], device: torch.device) -> FlatInput:
    """Lay rows of token ids end to end; none may be empty."""
    assert all(rows), "an empty row has no token to go on from"
    lengths = torch.tensor([len(row) for row in rows])
    ends = lengths.cumsum(0)
    input_ids = torch.tensor([token for row in rows for token in row])
    positions = torch.arange(len(input_ids)) - (ends - lengths).repeat_interleave(lengths)
    borders = torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(torch.int32)
    segments = Segments(borders, tuple(lengths.tolist()))
    return FlatInput(input_ids.to(device), positions.to(device), segments.move(device))


def run_flat(model: PreTrainedModel, input_ids: Tensor, positions: Tensor, layout: RowLayout, keep: Tensor) -> Tensor:
    """Return the logits [N, V] at `keep` [N] of a flat input [T]; to be called within `flat_attention`."""
    can_choose = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits: Tensor = model(
        input_ids=input_ids[None],
        position_ids=positions[None],
        use_cache=False,
        layout=layout,
        **({"logits_to_keep": keep} if can_choose else {}),
    ).logits[0]
    return logits if can_choose else logits[keep]


@contextmanager
def flat_attention(model: PreTrainedModel) -> Iterator[None]:
    """Put the attention of layouts in place of the model's own for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: RowLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' layers ask for it: heads before tokens going in, after them coming out."""
    for name in _UNKNOWN_TERMS:
        if others.get(name) is not None:
            raise UnsupportedModelError(f"its attention has {name}")
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    attended = layout.attend(module.layer_idx, queries, keys, values, scale=scale, window=sliding_window)
    return attended[None], None


AttentionInterface.register(_NAME, _attend)


def check_model(model: PreTrainedModel) -> None:
    """Try out two short rows, end to end, against the model's own forward pass.

    Raises:
        UnsupportedModelError: the model cannot be run flat.
    """
    config: Any = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if layers:
        raise UnsupportedModelError(f"it has layers of type {', '.join(sorted(layers))}")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") in _CHANGING_ROPES:
            raise UnsupportedModelError(f"its rotary angles are {rope['rope_type']}")
    if limit := find_row_limit(config):
        raise UnsupportedModelError(limit[1])
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError("it takes no positions")
    rows = make_trial_rows(model)
    expected = torch.cat([compute_logits(model, row) for row in rows])
    compare(expected, _try_rows(model, rows))


def make_trial_rows(model: PreTrainedModel) -> list[list[int]]:
    """Draw two short rows of token ids."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (7, 12)]


@torch.inference_mode()
def compute_logits(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """Return a row's logits [T, V] by the model's own forward pass."""
    logits: Tensor = model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False).logits[0]
    return logits


@torch.inference_mode()
def _try_rows(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of all tokens of flat rows, or raise UnsupportedModelError."""
    flat = lay_flat(rows, model.device)
    try:
        with flat_attention(model):
            keep = torch.arange(len(flat.input_ids), device=model.device)
            return run_flat(model, flat.input_ids, flat.positions, Rows(flat.segments), keep)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        if isinstance(error, (UnsupportedModelError, torch.OutOfMemoryError)):
            raise
        raise UnsupportedModelError(describe_failure(error)) from error


def describe_failure(error: Exception) -> str:
    """Say where a model's forward pass stopped on a trial: at which line of its own code, and by what."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((each for each in reversed(frames) if "transformers" in Path(each.filename).parts), frames[-1])
    what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    place = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
    return f"tried so on two short rows of random tokens, its forward pass stopped ({place}: {what})"


def compare(expected: Tensor, found: Tensor) -> None:
    """Raise UnsupportedModelError where logits differ by more than another order of summation would explain.

    In 16 bits, two ways through a deep model of random weights differ by some hundredths of the norm; one that mixes
    rows or forgets a position, by about one.
    """
    limit = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.2
    off = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    if not off <= limit:
        raise UnsupportedModelError(f"on a trial its logits differ by {off:.2g} of their norm (limit {limit:g})")
