"""How a pass is made to hold an example that does not fit although every layer is recomputed.

First the gated layers run in pieces of tokens (`tasks.decoder.pieces`); where that is not enough, the inputs of as many
layers as it takes lie in the host's memory (`tasks.decoder.host_inputs`). Both are engaged for such examples alone.

Legend: `L` layers, `H` hidden size, `P` tokens of a piece.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

from tasks.decoder.host_inputs import CHUNK_BYTES, HostMemory
from tasks.decoder.pieces import PIECE_TOKENS
from tasks.host_memory import HOST_SHARE, read_free_host
from tasks.training.distributed import gather, machine
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.pass_need import Need

IN_TURN = 2
"""Inputs that are on the device beside those that stay there: a layer's own, and the next one's on its way."""
# So small that the trial's peak is not in a piece: what pieces do not change is measured.
_TRIAL_PIECE = 64

logger = logging.getLogger(__name__)


def fit_long(
    engine: FusedEngine,
    lean: Need,
    longest: int,
    measure: Callable[[FusedEngine], Need | None],
    *,
    free_bytes: float,
    all_bytes: float,
) -> FusedEngine:
    """Return the engine with what it takes for the longest example; `longest_fit` says where nothing is enough.

    Args:
        engine: with every layer recomputed.
        lean: what its pass takes.
        longest: tokens of the longest example, which do not fit.
        measure: an engine's pass, on all ranks.
        free_bytes: of the device, that are planned for.
        all_bytes: with those that never are: what does not fit into them is hopeless.
    """
    need, input_bytes = lean, count_input_bytes(engine)
    if longest > PIECE_TOKENS and any(layer.can_run_in_pieces for layer in engine.decoder.layers):
        pieces = measure(replace(engine, piece_tokens=_TRIAL_PIECE))
        if pieces is not None:
            # What exists of a piece beside is at most what a whole layer's work takes of as many tokens.
            piece_bytes = PIECE_TOKENS * max(0.0, lean.bytes_per_token - engine.num_layers * input_bytes)
            pieces = pieces._replace(fixed_bytes=pieces.fixed_bytes + piece_bytes)
        if pieces is not None and pieces.count_tokens(free_bytes) > lean.count_tokens(free_bytes):
            logger.info("Every layer recomputed, gated layers in pieces: %s", pieces)
            engine, need = replace(engine, piece_tokens=PIECE_TOKENS), pieces
    if need.count_tokens(free_bytes) < longest:
        engine = _use_host(engine, need, longest, input_bytes, free_bytes=free_bytes, all_bytes=all_bytes)
    logger.info("For an example of %s tokens: %s", f"{longest:,}", engine.describe_long() or "every layer recomputed")
    return engine


def choose_in_host(
    need: Need, input_bytes: int, num_layers: int, *, free_bytes: float, host_bytes: float, longest: int
) -> tuple[int, int]:
    """Return how many layers' inputs have to lie in the host's memory, and the longest example that fits with any.

    As few as it takes; where none is enough, as many as the host has room for.

    Args:
        need: of a pass with all inputs on the device.
        input_bytes: of a token, in a layer's input.
        num_layers: L; the last one's input is wanted at once, and stays.
        free_bytes: of the device.
        host_bytes: of the host's memory that may be taken.
        longest: tokens of the longest example.
    """
    room = _round_up(longest * input_bytes)
    number, most_tokens = 0, need.count_tokens(free_bytes)
    for count in range(1, num_layers):
        slope = need.bytes_per_token + (IN_TURN - count) * input_bytes
        on_device = need._replace(bytes_per_token=max(1.0, slope)).count_tokens(free_bytes)
        in_host = int(host_bytes / count) // CHUNK_BYTES * CHUNK_BYTES // input_bytes
        most_tokens = max(most_tokens, min(on_device, in_host))
        if count * room <= host_bytes:
            number = count
            if on_device >= longest:
                break
    return number, most_tokens


def count_input_bytes(engine: FusedEngine) -> int:
    """Return the bytes of a token in a layer's input."""
    adapters = engine.decoder.layers[0].qkv.adapters
    return len(engine.decoder.norm.weight) * adapters.joint_a.dtype.itemsize


def _use_host(
    engine: FusedEngine, need: Need, longest: int, input_bytes: int, *, free_bytes: float, all_bytes: float
) -> FusedEngine:
    """Return the engine with layers' inputs in the host's memory."""
    machines = gather(machine())
    host_bytes = min(gather(HOST_SHARE * read_free_host() / machines.count(machine())))
    (number, planned), (_, possible) = (
        choose_in_host(
            need, input_bytes, engine.num_layers, free_bytes=on_device, host_bytes=host_bytes, longest=longest
        )
        for on_device in (free_bytes, all_bytes)
    )
    logger.info(
        "Inputs of %d of %d layers in the host's memory: %.1f GiB of %.1f that may be taken there",
        number,
        engine.num_layers,
        number * _round_up(longest * input_bytes) / 2**30,
        host_bytes / 2**30,
    )
    host = HostMemory(engine.device) if number else None
    return replace(engine, num_in_host=number, host=host, longest_fit=planned if possible < longest else 0)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // CHUNK_BYTES) * CHUNK_BYTES
