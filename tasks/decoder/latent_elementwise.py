"""What latent attention does between its products, in plain PyTorch; `latent_kernels` does the same.

Dimensions: `T` tokens, `N` heads, `P` columns of a head that stay, `R` that are rotated, `V` of its values, D = P + R.

Arithmetic is in fp32 (fp64 for fp64 input) and rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.decoder.elementwise import Heads, turn, widen


class LatentHeads(NamedTuple):
    """Layout of the heads of latent attention."""

    num: int
    """N"""
    plain: int
    """P"""
    rotated: int
    """R"""
    value: int
    """V, at most D"""
    is_interleaved: bool
    """Neighbouring columns are rotated together, in place of those of the two halves."""

    @property
    def size(self) -> int:
        """Return D."""
        return self.plain + self.rotated


def join_heads(
    queries: Tensor, keys_values: Tensor, rotated: Tensor, cos: Tensor, sin: Tensor, heads: LatentHeads
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [T, N, D]; behind a head's V values are zeros, which FlashAttention wants.

    Args:
        queries: [T, N D], of a head the P columns first.
        keys_values: [T, N (P + V)], of a head the key's P columns first.
        rotated: [T, R], which the keys of all heads have in common.
        cos: [T, R / 2] of the positions' angles.
        sin: likewise.
        heads: the layout.
    """
    turned_queries, turned_keys = (
        _turn(states.unflatten(-1, (-1, heads.rotated)), cos, sin, heads)
        for states in (queries.unflatten(-1, (heads.num, -1))[..., heads.plain :].flatten(1), rotated)
    )
    plain_queries = queries.unflatten(-1, (heads.num, -1))[..., : heads.plain]
    plain_keys, values = keys_values.unflatten(-1, (heads.num, -1)).split([heads.plain, heads.value], dim=-1)
    filled = values.new_zeros(*values.shape[:2], heads.size)
    filled[..., : heads.value] = values
    keys = torch.cat([plain_keys, turned_keys.expand(-1, heads.num, -1)], dim=-1)
    return torch.cat([plain_queries, turned_queries], dim=-1), keys, filled


def join_heads_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    heads: LatentHeads,
    to_queries: Tensor,
    to_keys_values: Tensor,
) -> Tensor:
    """Write the gradients of `join_heads`'s first two arguments, and return that of the third."""
    of_queries, of_keys, of_values = grads
    query_heads = to_queries.unflatten(-1, (heads.num, -1))
    query_heads[..., : heads.plain] = of_queries[..., : heads.plain]
    query_heads[..., heads.plain :] = _turn(of_queries[..., heads.plain :], cos, -sin, heads)
    other_heads = to_keys_values.unflatten(-1, (heads.num, -1))
    other_heads[..., : heads.plain] = of_keys[..., : heads.plain]
    other_heads[..., heads.plain :] = of_values[..., : heads.value]
    together = widen(of_keys[..., heads.plain :]).sum(1, keepdim=True)
    return _turn(together, cos, -sin, heads)[:, 0].to(of_keys.dtype)


def _turn(states: Tensor, cos: Tensor, sin: Tensor, heads: LatentHeads) -> Tensor:
    """Rotate whole columns [T, heads, R]."""
    layout = Heads(1, 1, heads.rotated, heads.is_interleaved)
    return turn(widen(states), cos, sin, layout).to(states.dtype)
