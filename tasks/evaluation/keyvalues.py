"""A key-value cache with a fixed place (slot) for each row, and the attention of each row's newest token to it.

Dimensions: `T` tokens of a flat input, `W` slots, `L` tokens a slot holds, `G` query heads a key head serves, `D` head
size.

A slot is the place of one row. Nothing here depends on the host: which token stands where is read from tensors, so that
a step over all slots can be recorded once and run again and again.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)
from torch.nn.attention import SDPBackend, sdpa_kernel

from tasks.decoder.attention import Segments, attend

# Kernels that take a mask; the last one takes everything.
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class KeyValues:
    """What attention remembers of each slot, layer by layer; the memory is taken when a layer first writes."""

    num_slots: int
    slot_length: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values, [W * L, heads, D] each."""

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [T, heads, D] at places [T]: slot * L + position."""
        if layer not in self.layers:
            # Zeros: what is masked out counts for nothing, but 0 times NaN would be NaN.
            self.layers[layer] = tuple(  # type: ignore[assignment]
                states.new_zeros(self.num_slots * self.slot_length, *states.shape[1:]) for states in (keys, values)
            )
        for memory, states in zip(self.layers[layer], (keys, values), strict=True):
            memory.index_copy_(0, places, states)

    def read(self, layer: int, num_slots: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """View the first tokens of the first slots, [slots, heads, tokens, D]."""
        keys, values = (
            memory.unflatten(0, (self.num_slots, self.slot_length))[:num_slots, :num_tokens].transpose(1, 2)
            for memory in self.layers[layer]
        )
        return keys, values

    def move(self, slots: Tensor) -> None:
        """Let what is in `slots` be in the first slots instead."""
        for layer in self.layers.values():
            for memory in layer:
                rows = memory.unflatten(0, (self.num_slots, self.slot_length))
                rows[: len(slots)] = rows[slots]

    def count_bytes(self) -> int:
        """Return the bytes of a token, all layers together."""
        num_tokens = self.num_slots * self.slot_length
        return sum(memory.nbytes for layer in self.layers.values() for memory in layer) // num_tokens


@dataclass(frozen=True)
class NewRows:
    """Whole rows end to end, whose keys and values are to be remembered."""

    segments: Segments
    memory: KeyValues
    places: Tensor
    """[T]"""

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """Attend causally in each row."""
        self.memory.write(layer, places=self.places, keys=keys, values=values)
        return attend(queries, keys, values, self.segments, scale=scale, window=window)


@dataclass(frozen=True)
class NewestTokens:
    """The newest token of each of the first slots."""

    memory: KeyValues
    positions: Tensor
    """[W] of the tokens in their rows."""
    num_seen: int
    """No position is at or above this one."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """By window: what is added to the scores, [W, 1, 1, num_seen]."""

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """Attend to all that the token's slot remembers, itself included."""
        num_slots = len(self.positions)
        slots = torch.arange(num_slots, device=queries.device)
        self.memory.write(layer, slots * self.memory.slot_length + self.positions, keys, values)
        all_keys, all_values = self.memory.read(layer, num_slots, self.num_seen)
        # The queries that share a key head stand where a row's tokens would: nothing is repeated for them.
        grouped = queries.unflatten(1, (all_keys.shape[1], -1))
        mask = self._find_mask(window, queries.dtype).expand(-1, grouped.shape[1], grouped.shape[2], -1)
        with sdpa_kernel(_BACKENDS, set_priority=True):
            attended = F.scaled_dot_product_attention(grouped, all_keys, all_values, attn_mask=mask, scale=scale)
        return attended.flatten(1, 2)

    def _find_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self.masks:
            distance = self.positions[:, None] - torch.arange(self.num_seen, device=self.positions.device)
            is_seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device).masked_fill_(~is_seen, -torch.inf)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]
