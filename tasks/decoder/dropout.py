"""LoRA dropout whose masks are a function of numbers alone: nothing of them is stored.

Dimensions: `T` tokens of a forward pass, `H` columns of a tensor, `R` the rank of a group of projections.

The adapter computes y = W x + s B A (m * x) / (1 - p) with m [T, H] of zeros and ones. Projections that share an input
(q, k and v; gate and up) share one mask; PEFT draws one for each of them. Whether a column of a token's row is kept
follows from

    key        of the forward pass: a digest of seed, step and the number of the micro batch
    site       of the projection: see `number_site`
    row        of the token in the forward pass
    column

through Philox 4x32 with 7 rounds (Salmon et al., 2011: the fewest that pass BigCrush, one more than fails), eight
columns a call, 16 bits each. Forward pass, backward pass and recomputation draw the same, and so does a resumed run.

The key lies in a tensor on the device, so that a recorded CUDA graph draws anew in each replay.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLUMNS_PER_CALL = 8
ROUNDS = 7
_STEPS = 1 << 16
_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
# Of the linear layers of a decoder layer: those that share an input share a site.
SITES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), 0),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba"), 0),
    **dict.fromkeys(("a_proj", "b_proj", "g_proj"), 0),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), 0),
    **dict.fromkeys(("o_proj", "out_proj"), 1),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), 2),
    "down_proj": 3,
    # Of Gemma 4's own inputs of a layer; the last one is of all layers together.
    "per_layer_input_gate": 4,
    "per_layer_projection": 5,
    "per_layer_model_projection": 6,
    # Of latents.
    "q_b_proj": 7,
    "kv_b_proj": 8,
}
BEFORE_MIXING = (0, 7, 8)
"""Places of those that come before a layer mixes its tokens: in the last layer too, they see all of them."""
# Sites below it are four a layer.
_FURTHER_SITES = 1 << 20


class Mask(NamedTuple):
    """Which columns of a tensor [T, H] are kept, and what they are multiplied with."""

    key: Tensor
    """[1] int64, on the tensor's device."""
    site: int
    threshold: int
    """A column is dropped where its 16 bits are below it."""
    scale: float
    """One over the share that is kept, exactly: the mean is that of the tensor."""
    first_row: int = 0
    """Number of the tensor's first row in the forward pass."""


class MaskedTensor(NamedTuple):
    """Room for a masked copy, or a gradient that has a mask still before it."""

    values: Tensor
    """[T, H]"""
    mask: Mask


@dataclass(frozen=True)
class Dropout:
    """The dropout of a decoder's adapter."""

    p: float
    """Share of the columns that is dropped, rounded to a multiple of 1 / 65536."""
    key: Tensor
    """[1] int64, on the decoder's device."""
    first_row: int = 0
    """Number in the forward pass of the first row of the tensors that are masked: of a piece of its tokens."""

    def start_forward(self, key: int) -> None:
        """Set the key of the next forward pass and its backward pass, in the order of the device's work.

        Autograd refuses a backward pass whose key has been replaced meanwhile.

        Args:
            key: from `derive_key`.
        """
        assert not (self.key.is_cuda and torch.cuda.is_current_stream_capturing()), "a graph would keep its first key"
        self.key.fill_(key)

    def mask(self, site: int) -> Mask:
        """Return the mask of a site."""
        threshold = min(round(self.p * _STEPS), _STEPS - 1)
        return Mask(self.key, site, threshold, _STEPS / (_STEPS - threshold), self.first_row)


def number_site(layer: int, name: str) -> int:
    """Return the site of a linear layer, one of `SITES`, of decoder layer `layer`."""
    place = SITES[name]
    return 4 * layer + place if place < 4 else _FURTHER_SITES + 3 * layer + place


def derive_key(seed: int, step: int, number: int) -> int:
    """Return 64 signed bits for a micro batch: other ones for every seed, step and number in the step."""
    words = np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)
    return int(words.view(np.int64)[0])


def draw_kept(mask: Mask, rows: Tensor, width: int) -> Tensor:
    """Return which columns of the rows [T] (numbers, int64) are kept: [T, width], what the kernels draw."""
    calls = torch.arange(-(-width // COLUMNS_PER_CALL), device=rows.device)
    zeros = torch.zeros(len(rows), len(calls), dtype=torch.int64, device=rows.device)
    words = draw_words(mask.key, (zeros + calls, zeros + rows[:, None], zeros + mask.site, zeros))
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return lanes.flatten(1)[:, :width] >= mask.threshold


def draw_words(key: Tensor, counters: tuple[Tensor, ...], *, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Return four words of 32 random bits for each place of four counters of 32 bits (Philox), all in int64.

    Args:
        key: [1], 64 bits.
        counters: four of one shape.
        rounds: 10 in most libraries.
    """
    first, second, third, fourth = counters
    low, high = key & _LOW, (key >> 32) & _LOW
    for _ in range(rounds):
        # A product of 64 bits may pass the sign: the shifted sign's copies are cut off.
        left, right = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]
        first, second = ((right >> 32) & _LOW) ^ second ^ low, right & _LOW
        third, fourth = ((left >> 32) & _LOW) ^ fourth ^ high, left & _LOW
        low, high = (low + _KEY_STEPS[0]) & _LOW, (high + _KEY_STEPS[1]) & _LOW
    return first, second, third, fourth


def apply_mask(values: Tensor, mask: Mask) -> Tensor:
    """Return values [T, H], fp32 or wider, masked and scaled."""
    rows = torch.arange(mask.first_row, mask.first_row + values.shape[0], device=values.device)
    kept = draw_kept(mask, rows, values.shape[1])
    return torch.where(kept, values * mask.scale, 0.0)
