"""The functions of `latent_elementwise` as Triton kernels. Imported where there is a GPU only."""

import triton
from torch import Tensor

from tasks.decoder.latent_elementwise import LatentHeads
from tasks.decoder.latent_programs import join_heads_backward_program, join_heads_program

_LEAST_BLOCK = 16
# Heads of a token that a program has at a time.
_HEADS = 16


def join_heads(
    queries: Tensor, keys_values: Tensor, rotated: Tensor, cos: Tensor, sin: Tensor, heads: LatentHeads
) -> tuple[Tensor, Tensor, Tensor]:
    """See `latent_elementwise.join_heads`."""
    num_tokens = len(queries)
    made = tuple(queries.new_empty(num_tokens, heads.num, heads.size) for _ in range(3))
    join_heads_program[(num_tokens,)](
        queries, keys_values, rotated, cos, sin, *made,
        queries.stride(0), keys_values.stride(0), rotated.stride(0), cos.stride(0), **_describe(heads), num_warps=4,
    )  # fmt: skip
    return made[0], made[1], made[2]


def join_heads_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    heads: LatentHeads,
    to_queries: Tensor,
    to_keys_values: Tensor,
) -> Tensor:
    """See `latent_elementwise.join_heads_backward`."""
    num_tokens = len(to_queries)
    rotated = to_queries.new_empty(num_tokens, heads.rotated)
    join_heads_backward_program[(num_tokens,)](
        *(grad.contiguous() for grad in grads), cos, sin, to_queries, to_keys_values, rotated,
        to_queries.stride(0), to_keys_values.stride(0), cos.stride(0), **_describe(heads), num_warps=4,
    )  # fmt: skip
    return rotated


def _describe(heads: LatentHeads) -> dict[str, int | bool]:
    """Return the constants of the programs."""
    half = heads.rotated // 2
    return {
        "NUM": heads.num,
        "PLAIN": heads.plain,
        "HALF": half,
        "VALUE": heads.value,
        "HEADS": _HEADS,
        "PLAIN_BLOCK": max(_LEAST_BLOCK, triton.next_power_of_2(heads.plain)),
        "HALF_BLOCK": max(_LEAST_BLOCK, triton.next_power_of_2(half)),
        "VALUE_BLOCK": max(_LEAST_BLOCK, triton.next_power_of_2(heads.size)),
        "INTERLEAVED": heads.is_interleaved,
    }
