"""How many tokens go through the fused decoder at once: measured on the machine, not guessed.

A forward and backward pass takes, at its peak, a fixed amount and so many bytes a token. Two small passes with made-up
tokens give both, once with everything kept and once with every layer recomputed; the rest is arithmetic.
"""

import logging
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.batches import Batch, form_flat_batch
from tasks.training.engines import FusedEngine
from tasks.training.token_table import TokenTable

LARGEST_FORWARD = 65536
# Below this many tokens the products no longer fill a large GPU: recomputing layers is the better way to save memory.
SMALLEST_FULL_FORWARD = 8192
# Part of the free memory that is planned for; the rest is for what the measurement does not see.
_SHARE = 0.9
_TRIALS = (1024, 2048)
# Bytes of logits at a time where memory is short.
_SMALL_LOGITS = 1 << 28


logger = logging.getLogger(__name__)


class Need(NamedTuple):
    """Memory of a pass at its peak."""

    fixed_bytes: float
    bytes_per_token: float

    def count_tokens(self, free_bytes: float) -> int:
        """Return how many tokens fit."""
        return int((free_bytes - self.fixed_bytes) / self.bytes_per_token)

    def __str__(self) -> str:
        """Say it in the units of a person."""
        return f"{self.fixed_bytes / 2**30:.1f} GiB and {self.bytes_per_token / 2**20:.2f} MiB a token"


def fit_memory(
    engine: FusedEngine, *, num_parameters: int, most_tokens: int, recompute: bool | None, reserved_bytes: int = 0
) -> FusedEngine:
    """Return the engine with the forward pass and the recomputation that the GPU's free memory allows.

    Args:
        engine: on a CUDA device.
        num_parameters: that are trained: AdamW will take 8 bytes each.
        most_tokens: of a step: more would never be used.
        recompute: every layer or none; None: what fits.
        reserved_bytes: left free.
    """
    num_layers = len(engine.decoder.layers)
    free_bytes = _SHARE * _read_free(engine.device) - 8 * num_parameters - reserved_bytes
    most_tokens = min(most_tokens, LARGEST_FORWARD)
    small = replace(engine, num_recomputed=num_layers, logits_bytes=_SMALL_LOGITS)
    kept = _measure(engine) if recompute is not True else None
    logger.info("Free for a forward pass: %.1f GiB; everything kept: %s", free_bytes / 2**30, kept)
    if kept is not None:
        tokens = kept.count_tokens(free_bytes)
        if recompute is False or tokens >= min(most_tokens, SMALLEST_FULL_FORWARD):
            return _plan(engine, tokens, most_tokens)
    lean = _measure(small)
    logger.info("Every layer recomputed: %s", lean)
    tokens = lean.count_tokens(free_bytes)
    if kept is None or min(tokens, most_tokens) <= SMALLEST_FULL_FORWARD:
        return _plan(small, tokens, most_tokens)
    # What is left over at a full forward pass keeps some layers' activations.
    tokens = SMALLEST_FULL_FORWARD
    left = free_bytes - lean.fixed_bytes - lean.bytes_per_token * tokens
    a_layer = (kept.bytes_per_token - lean.bytes_per_token) * tokens / num_layers
    num_kept = max(0, min(num_layers, int(left / a_layer))) if a_layer > 0 else 0
    return replace(_plan(small, tokens, tokens), num_recomputed=num_layers - num_kept)


def _measure(engine: FusedEngine) -> Need:
    """Do two passes with made-up tokens; the adapter's gradient is left as it was: none."""
    peaks = []
    for tokens in _TRIALS:
        batch = _make_up(tokens)
        torch.cuda.synchronize(engine.device)
        before = torch.cuda.memory_allocated(engine.device)
        torch.cuda.reset_peak_memory_stats(engine.device)
        (engine.sum_losses(batch) / tokens).backward()
        peaks.append(torch.cuda.max_memory_allocated(engine.device) - before)
        for layer in engine.decoder.layers:
            for projection in layer.projections:
                for parameter in projection.adapters.parameters:
                    parameter.grad = None
    slope = max(1.0, (peaks[1] - peaks[0]) / (_TRIALS[1] - _TRIALS[0]))
    # The logits do not grow any more once a chunk is full; small passes have not filled it.
    return Need(max(0.0, peaks[0] - slope * _TRIALS[0]) + engine.logits_bytes, slope)


def _make_up(num_tokens: int) -> Batch:
    """Return a flat batch of segments of 256 tokens, two thirds of them trained."""
    length = 256
    input_ids = np.arange(num_tokens, dtype=np.int32) % 97
    targets = np.where(np.arange(num_tokens) % 3 == 0, IGNORE_INDEX, input_ids).astype(np.int32)
    offsets = np.arange(0, num_tokens + 1, length, dtype=np.int64)
    table = TokenTable([f"made up {i}" for i in range(len(offsets) - 1)], offsets, input_ids, targets)
    return form_flat_batch(table, range(len(offsets) - 1))


def _read_free(device: torch.device) -> float:
    """Return the bytes that PyTorch could still allocate."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return float(free)


def _plan(engine: FusedEngine, tokens: int, most_tokens: int) -> FusedEngine:
    """Plan for the tokens that fit, rounded down to a multiple of 512, at least 512; no more than ever asked for."""
    room = min(max(512, tokens // 512 * 512), LARGEST_FORWARD)
    return replace(engine, tokens_per_forward=most_tokens if tokens >= most_tokens else room, room_tokens=room)
