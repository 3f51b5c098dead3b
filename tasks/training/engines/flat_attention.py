"""Attention of examples that lie end to end, for any model of transformers that asks its attention by name.

transformers lets an attention function and a mask function be registered under a name. Ours are registered here: the
mask function gives no mask but the borders of the examples, and the attention function hands each example to an
attention of variable lengths. What a family's layers ask for that is not understood (a soft cap, sinks, a bias of
positions, a mask of another form) raises `FlatAttentionError`, and the family keeps its own attention.

Dimensions: `T` tokens of all examples, `D` head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)
from transformers import AttentionInterface, AttentionMaskInterface

from tasks.decoder.attention import Attention, Segments, attend_flash4, attend_one_by_one, find_attentions

NAME = "sft_end_to_end"
# Arguments of an attention call that do not change what it computes, whatever they hold.
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "logits_to_keep", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings",
    "position_ids", "return_dict", "use_cache",
}  # fmt: skip
# Positions at which a mask is compared with what it is taken for.
_PROBES = 64
_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8


class FlatAttentionError(ValueError):
    """A layer's attention asks for something that is not understood; the message says what."""


@dataclass(frozen=True)
class FlatLayout:
    """Where the examples of a forward pass lie; layers get it in place of a mask."""

    segments: Segments
    attend: Attention
    checked_length: int | None = None
    """Of a trial: masks have to be causal, with or without a window, up to this many tokens."""
    window: int | None = None
    """Of a trial: what the mask says, None for all."""


_layouts: list[FlatLayout] = []  # of the forward pass under way: at most one


@contextmanager
def laid_out(layout: FlatLayout) -> Iterator[None]:
    """Give the masks of the forward pass within their layout; its backward pass holds on to it by itself."""
    _layouts.append(layout)
    try:
        yield
    finally:
        _layouts.pop()


def find_layout() -> FlatLayout | None:
    """Return the layout of the forward pass under way, if there is one."""
    return _layouts[-1] if _layouts else None


def use_flat_attention(base: Any) -> Callable[[], None]:
    """Have a model attend by `attend_flat`; return a function that gives it its own attention back.

    Raises:
        FlatAttentionError: its attention cannot be chosen.
    """
    AttentionInterface.register(NAME, attend_flat)
    AttentionMaskInterface.register(NAME, make_layout)
    text = base.config.get_text_config()
    own = text._attn_implementation

    def give_back() -> None:
        base.set_attn_implementation(own)

    try:
        base.set_attn_implementation(NAME)
    except (ValueError, KeyError) as error:
        give_back()
        raise FlatAttentionError(str(error)) from error
    if text._attn_implementation != NAME:
        give_back()
        raise FlatAttentionError("its attention is not one that can be chosen by name")
    return give_back


def find_kinds(device: torch.device, dtype: torch.dtype) -> tuple[Attention, ...]:
    """Return the attentions of variable lengths for a device and a dtype, the fastest first; the last one is exact."""
    # FlashAttention 4 compiles for each new form of a batch, and here nobody has compiled them before.
    return tuple(kind for kind in find_attentions(device, dtype, 0) if kind is not attend_flash4)


def make_layout(*, mask_function: Callable[..., Tensor], device: torch.device | None = None, **_: Any) -> FlatLayout:
    """Return the layout of the forward pass under way, in place of a mask; transformers calls this.

    Raises:
        FlatAttentionError: there is none, or in a trial: the mask is of another form.
    """
    if not _layouts:
        raise FlatAttentionError("a forward pass without a layout of its examples")
    layout = _layouts[-1]
    if layout.checked_length is None:
        return layout
    return replace(layout, window=_find_window(mask_function, layout.checked_length, device))


def attend_flat(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """Attend within each example; transformers' layers call this.

    Args:
        module: the layer's attention.
        query: [1, query heads, T, D]
        key: [1, key heads, T, D]
        value: [1, key heads, T, D of values]
        attention_mask: the layout.
        dropout: 0.
        scaling: of the scores; None: 1 / sqrt(D).
        sliding_window: tokens that a token sees, itself included.
        is_causal: None or True.
        further: nothing that changes the result.

    Returns:
        [1, T, query heads, D of values], and no weights.

    Raises:
        FlatAttentionError: anything else is asked for.
    """
    if not isinstance(attention_mask, FlatLayout):
        raise FlatAttentionError("a layer makes its mask by itself")
    layout = attention_mask
    unknown = sorted(
        name for name, asked in further.items() if name not in _HARMLESS and asked is not None and asked is not False
    )
    if unknown:
        raise FlatAttentionError(f"its attention is called with {', '.join(unknown)}")
    if dropout:
        raise FlatAttentionError(f"its attention drops {dropout:g} of its weights")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise FlatAttentionError("its attention is not causal")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise FlatAttentionError("its queries and keys are not those of one row")
    if layout.checked_length is not None:
        _check_window(layout, sliding_window)
    size, value_size = query.shape[-1], value.shape[-1]
    states = [state[0].transpose(0, 1) for state in (query, key, value)]
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        states = [state.to(dtype) for state in states]
    if layout.attend is not attend_one_by_one:
        # FlashAttention wants one size for all, a multiple of 8.
        if max(size, value_size) > _LARGEST_HEAD:
            raise FlatAttentionError(f"its heads are {max(size, value_size)} wide, above {_LARGEST_HEAD}")
        wide = -(-max(size, value_size) // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
        states = [F.pad(state, (0, wide - state.shape[-1])) for state in states]
    scale = size**-0.5 if scaling is None else float(scaling)
    queries, keys, values = states
    attended = layout.attend(queries, keys, values, layout.segments, scale=scale, window=sliding_window)
    return attended[None, ..., :value_size], None


def _check_window(layout: FlatLayout, sliding_window: int | None) -> None:
    """Raise FlatAttentionError unless the window that a layer gives is the one of its mask."""
    assert layout.checked_length is not None
    given = sliding_window if sliding_window is not None and sliding_window < layout.checked_length else None
    if given != layout.window:
        raise FlatAttentionError(f"its mask has a window of {layout.window} and its attention one of {given}")


def _find_window(mask_function: Callable[..., Tensor], length: int, device: torch.device | None) -> int | None:
    """Return how many tokens a token sees by a mask of one example, None for all before it.

    Raises:
        FlatAttentionError: not simply the nearest ones before it.
    """
    queries = torch.linspace(0, length - 1, min(length, _PROBES), device=device).long()[:, None]
    keys = torch.arange(length, device=device)[None]
    first = torch.zeros((), dtype=torch.long, device=device)
    seen = mask_function(first, first, queries, keys).broadcast_to(len(queries), length)
    window = int(seen[-1].sum().item())
    if not torch.equal(seen, (keys <= queries) & (keys > queries - window)):
        raise FlatAttentionError("its mask is neither causal nor a sliding window")
    return window if window < length else None
