"""What the fused engine's layers keep of a token for the backward pass: counted on the model without values.

A pass of the fused decoder over made-up tokens on the meta device computes nothing and notes what autograd is given to
keep. Attention stands for FlashAttention, which keeps queries, keys, values, its output and a value of fp32 a head.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.config import TrainingConfig
from tasks.decoder.attention import Segments
from tasks.decoder.decoder import Decoder, compute_losses
from tasks.decoder.recognition import recognize_decoder
from tasks.merging.changes import build_skeleton
from tasks.training.methods import attach_trained

logger = logging.getLogger(__name__)

_COUNTED_BY = {"rank", "alpha", "target_modules", "modules_to_save", "dropout", "use_dora"}
_SIZES = (256, 512)
"""Tokens of two passes: their difference has no part that is the same for any."""


def count_kept(folder: Path, config: TrainingConfig, dtype: torch.dtype) -> float:
    """Return the bytes of a token that the layers keep, their inputs among them, where no layer runs again.

    Args:
        folder: of the base model; its config.json is read.
        config: the training section.
        dtype: of the products.

    Returns:
        Bytes of all layers together; 0 where it cannot be counted so: of models that the fused engine does not know,
        of routed experts, whose rows depend on values, of quantized weights, of several candidates at once, and where a
        model's own weights are trained.
    """
    if not config.is_lora or config.base_weights != "full" or config.sweep.is_on or config.engine == "general":
        return 0.0
    text = (folder / "config.json").read_text(encoding="utf-8")
    return _count(folder, text, config.model_dump_json(include=_COUNTED_BY), dtype)


@lru_cache(maxsize=64)
def _count(folder: Path, text: str, settings: str, dtype: torch.dtype) -> float:
    """Count once for a model's config.json and the settings that change something."""
    try:
        with torch.device("meta"):
            skeleton: Any = build_skeleton(folder)
            model = attach_trained(skeleton.to(dtype), TrainingConfig.model_validate_json(settings), seed=0)
            decoder = recognize_decoder(model)
            decoder = replace(decoder, attend=_Flash.attend)
            small, large = (_count_pass(decoder, size) for size in _SIZES)
    except Exception as error:  # recognition, PEFT and operations without values fail in their own ways
        logger.debug("What layers keep is not counted: %s", error)
        return 0.0
    return (large - small) / (_SIZES[1] - _SIZES[0])


def _count_pass(decoder: Decoder, num_tokens: int) -> int:
    """Return the bytes that a pass keeps, without parameters and weights."""
    decoder.refresh()
    ids, positions = torch.zeros(num_tokens, dtype=torch.int64), torch.arange(num_tokens)
    segments = Segments(torch.zeros(2, dtype=torch.int32), (num_tokens,))
    with _noting() as kept:
        compute_losses(decoder, ids, positions, segments, positions, ids, runs_all=True)
    return sum(kept.values())


@contextmanager
def _noting() -> Iterator[dict[int, int]]:
    """Note the bytes of what autograd keeps, by their storage."""
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage takes another's place

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


class _Flash(torch.autograd.Function):
    """FlashAttention without its values."""

    @staticmethod
    def forward(context: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        output = torch.empty_like(queries)
        logsumexp = torch.empty(queries.shape[:2], dtype=torch.float32)
        context.save_for_backward(queries, keys, values, output, logsumexp)
        return output

    @staticmethod
    def attend(queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, **options: object) -> Tensor:
        """Attend as `tasks.decoder.attention.Attention` does."""
        output: Tensor = _Flash.apply(queries, keys, values)
        return output
