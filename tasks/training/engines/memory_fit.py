"""How many tokens go through the model at once, and how many layers run again: measured on the machine, not guessed.

A forward and backward pass takes, at its peak, a fixed amount and so many bytes a token. Two small passes with made-up
tokens give both, once with everything kept and once with every layer recomputed; the rest is arithmetic. An example
that does not fit with every layer recomputed is the matter of `long_examples`.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tasks.out_of_memory import is_out_of_memory
from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.distributed import gather
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.general import GeneralEngine
from tasks.training.engines.long_examples import fit_long
from tasks.training.engines.pass_need import Need
from tasks.training.token_table import TokenTable

LARGEST_FORWARD = 65536
# Below this many tokens the products no longer fill a large GPU: recomputing layers is the better way to save memory.
SMALLEST_FULL_FORWARD = 8192
# Part of the free memory that is planned for; the rest is for what the measurement does not see.
_SHARE = 0.9
MEASURED_PASSES = (1024, 2048)
_EXAMPLE_TOKENS = 256
# Bytes of logits at a time where memory is short.
SMALL_LOGITS = 1 << 28


logger = logging.getLogger(__name__)
AnyEngine = TypeVar("AnyEngine", FusedEngine, GeneralEngine)


def fit_memory(
    engine: AnyEngine,
    *,
    trained: Sequence[nn.Parameter],
    most_tokens: int,
    recompute: bool | None,
    longest: int = _EXAMPLE_TOKENS,
    longest_pass: int = 0,
    moment_bytes: int = 8,
    reserved_bytes: int = 0,
) -> AnyEngine:
    """Return the engine with the forward pass and the recomputation that the GPU's free memory allows.

    Args:
        engine: on a CUDA device.
        trained: parameters.
        most_tokens: of a step: more would never be used.
        recompute: every layer or none; None: what fits.
        longest: tokens of an example; where examples are padded, memory may grow with it.
        longest_pass: tokens that one pass has to hold in any case, those of the longest example.
        moment_bytes: that the optimizer will take for each of their values.
        reserved_bytes: left free.
    """
    num_parameters = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in trained)
    # All ranks go the same way: a pass may be a collective.
    free_bytes = min(gather(_SHARE * (_read_free(engine.device) - moment_bytes * num_parameters) - reserved_bytes))
    most_tokens = min(most_tokens, LARGEST_FORWARD)
    small = replace(engine, num_recomputed=engine.num_layers, logits_bytes=SMALL_LOGITS)
    kept = _measure_all(engine, trained, longest) if recompute is not True or not engine.num_layers else None
    fewest = max(longest, MEASURED_PASSES[0])
    logger.info("Free for a forward pass: %.1f GiB; everything kept: %s", free_bytes / 2**30, kept)
    if kept is not None:
        tokens = kept.count_tokens(free_bytes)
        wanted = max(min(most_tokens, SMALLEST_FULL_FORWARD), longest_pass)
        if recompute is False or not engine.num_layers or tokens >= wanted:
            return _plan(engine, tokens, most_tokens)
    if recompute is False or not engine.num_layers:
        return _plan(engine, fewest, most_tokens)
    lean = _measure_all(small, trained, longest)
    logger.info("Every layer recomputed: %s", lean)
    if lean is None:
        return _plan(small, fewest, most_tokens)
    tokens = lean.count_tokens(free_bytes)
    if isinstance(small, FusedEngine) and tokens < longest_pass:
        sizes = {"free_bytes": free_bytes, "all_bytes": free_bytes / _SHARE}
        long = fit_long(small, lean, longest_pass, lambda other: _measure_all(other, trained, longest), **sizes)
        return _plan(long, longest_pass, most_tokens)
    wanted = max(min(most_tokens, SMALLEST_FULL_FORWARD), longest_pass)
    if kept is None or tokens <= wanted:
        return _plan(small, tokens, most_tokens)
    # What is left over at a full forward pass keeps some layers' activations.
    tokens = wanted
    left = free_bytes - lean.fixed_bytes - lean.bytes_per_token * tokens
    a_layer = (kept.bytes_per_token - lean.bytes_per_token) * tokens / engine.num_layers
    num_kept = max(0, min(engine.num_layers, int(left / a_layer))) if a_layer > 0 else 0
    return replace(_plan(small, tokens, tokens), num_recomputed=engine.num_layers - num_kept)


def fit_all_ranks(engine: AnyEngine) -> AnyEngine:
    """Return the engine that fits on every rank: each makes all of a step's batches and takes its share."""
    needs = gather((engine.tokens_per_forward, -engine.num_recomputed, engine.logits_bytes, engine.room_tokens))
    tokens, kept, logits_bytes, room = (min(values) for values in zip(*needs, strict=True))
    return replace(engine, tokens_per_forward=tokens, num_recomputed=-kept, logits_bytes=logits_bytes, room_tokens=room)


def _measure_all(engine: AnyEngine, trained: Sequence[nn.Parameter], longest: int) -> Need | None:
    """Return what a pass takes on the rank on which it takes most; None where it does not fit on one."""
    needs = gather(_measure(engine, trained, longest))
    found = [need for need in needs if need is not None]
    return Need(*map(max, zip(*found, strict=True))) if len(found) == len(needs) else None


def _measure(engine: AnyEngine, trained: Sequence[nn.Parameter], longest: int) -> Need | None:
    """Do two passes with made-up tokens; None where these do not fit. No gradient is left behind."""
    try:
        return _do_passes(engine, trained, longest)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    _forget(engine, trained)
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _do_passes(engine: AnyEngine, trained: Sequence[nn.Parameter], longest: int) -> Need:
    """Return what two passes took."""
    length = _EXAMPLE_TOKENS
    if isinstance(engine, GeneralEngine) and engine.attend is None:
        length = max(length, min(longest, MEASURED_PASSES[1]))
    sizes = [max(tokens, number * length) for number, tokens in enumerate(MEASURED_PASSES, start=1)]
    peaks = []
    for size in sizes:
        batch = engine.form_trial(_make_up(size, length))
        torch.cuda.synchronize(engine.device)
        before = torch.cuda.memory_allocated(engine.device)
        torch.cuda.reset_peak_memory_stats(engine.device)
        if engine.replay_gradient(batch, 1.0 / size) is None:
            (engine.sum_losses(batch) / size).backward()
        peaks.append(torch.cuda.max_memory_allocated(engine.device) - before)
        _forget(engine, trained)
    slope = max(1.0, (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]))
    # The logits do not grow any more once a chunk is full; small passes have not filled it.
    return Need(max(0.0, peaks[0] - slope * sizes[0]) + engine.logits_bytes, slope)


def _forget(engine: AnyEngine, trained: Sequence[nn.Parameter]) -> None:
    """Leave no gradient; one that stays where it is takes its memory beforehand."""
    if isinstance(engine, FusedEngine) and engine.decoder.has_bound_gradients():
        engine.decoder.clear_gradients()
        return
    for parameter in trained:
        parameter.grad = None


def _make_up(num_tokens: int, length: int) -> TokenTable:
    """Return examples of so many tokens, the last one perhaps of fewer; two thirds of them are trained."""
    input_ids = np.arange(num_tokens, dtype=np.int32) % 97
    targets = np.where(np.arange(num_tokens) % 3 == 0, IGNORE_INDEX, input_ids).astype(np.int32)
    offsets = np.array([*range(0, num_tokens, length), num_tokens], np.int64)
    return TokenTable([f"made up {i}" for i in range(len(offsets) - 1)], offsets, input_ids, targets)


def _read_free(device: torch.device) -> float:
    """Return the bytes that PyTorch could still allocate."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return float(free)


def _plan(engine: AnyEngine, tokens: int, most_tokens: int) -> AnyEngine:
    """Plan for the tokens that fit, rounded down to a multiple of 512, at least 512; no more than ever asked for."""
    room = min(max(512, tokens // 512 * 512), LARGEST_FORWARD)
    return replace(engine, tokens_per_forward=most_tokens if tokens >= most_tokens else room, room_tokens=room)
