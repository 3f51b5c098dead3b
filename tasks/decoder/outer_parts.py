"""Reads what of a model is no linear layer: the embedding, and the angles of positions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tasks.decoder.known_layers import NO_ROTATION, KnownLayer
from tasks.decoder.module_reading import UnknownDecoderError
from tasks.decoder.weights import Embedding, TrainedWeights


def read_embedding(embedding: Any, config: Any, weights: TrainedWeights | None) -> Callable[[Tensor], Tensor]:
    """Return the embedding; Granite's is multiplied."""
    factor = getattr(config, "embedding_multiplier", 1.0)
    if weights is None or not embedding.weight.requires_grad:
        return embedding if factor == 1.0 else lambda input_ids: embedding(input_ids) * factor
    own = getattr(embedding, "embed_scale", 1.0)
    if (
        embedding.max_norm is not None
        or embedding.scale_grad_by_freq
        or (type(embedding) is not nn.Embedding and not hasattr(embedding, "embed_scale"))
    ):
        raise UnknownDecoderError(f"its {type(embedding).__name__} is trained")
    weights.add(embedding.weight)
    return Embedding(embedding, weights, factor * float(own))


def read_query_scale(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the factors by which queries grow with the position (Ministral 3); None where there are none."""
    rope = getattr(config, "rope_parameters", None) or {}
    beta = rope.get("llama_4_scaling_beta")
    if beta is None:
        return None
    start = rope["original_max_position_embeddings"]
    return lambda positions: 1.0 + beta * torch.log(1.0 + torch.floor(positions / start))


def read_angles(
    rotary: nn.Module, size: int, known: KnownLayer
) -> Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]:
    """Return the model's rotary angles as cos and sin [T, R / 2]; the model's own module makes them, once or twice."""

    def compute(states: Tensor, positions: Tensor, rope: str) -> tuple[Tensor, Tensor]:
        if rope == NO_ROTATION:
            cos = states.new_ones(len(positions), size // 2)
            return cos, torch.zeros_like(cos)
        cos, sin = _turn(rotary, states[None], positions, rope)
        if known.has_paired_angles:
            return cos[0, :, ::2].contiguous(), sin[0, :, ::2].contiguous()
        half = cos.shape[-1] if known.has_single_angles else cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    return compute


def _turn(rotary: Any, states: Tensor, positions: Tensor, rope: str) -> tuple[Tensor, Tensor]:
    """Return cos and sin [1, T, R] as each token's example has them alone.

    LongRoPE (Ding et al., 2024) has a second set of frequencies for examples above the length of the pretraining. The
    module of transformers takes one set for all of a row, by its highest position.
    """
    named = (rope,) if rope else ()
    kind = getattr(rotary, "rope_type", "default")
    if (kind[rope] if rope and isinstance(kind, dict) else kind) != "longrope":
        result: tuple[Tensor, Tensor] = rotary(states, positions[None], *named)
        return result
    parameters = rotary.config.rope_parameters
    limit = int((parameters[rope] if rope else parameters)["original_max_position_embeddings"])
    is_long = _list_lengths(positions) > limit
    short = rotary(states, positions.masked_fill(is_long, 0)[None], *named)
    long = rotary(states, positions.masked_fill(~is_long, limit)[None], *named)
    cos, sin = (torch.where(is_long[:, None], far, near) for far, near in zip(long, short, strict=True))
    return cos, sin


def _list_lengths(positions: Tensor) -> Tensor:
    """Return for each token [T] how many its example has, of examples that lie end to end."""
    numbers = (positions == 0).cumsum(0)
    highest = positions.new_zeros(len(positions) + 1).scatter_reduce(0, numbers, positions, "amax")
    return highest[numbers] + 1
