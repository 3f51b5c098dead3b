"""Several ranks that share each example's tokens: for examples that do not fit on one GPU.

The ranks of a group hold neighbouring slices of a flat batch. Everything but attention works on a token by itself, so a
rank does it for its slice; in the attention heads are exchanged for tokens, see `tasks.decoder.across`. Each rank has
the losses of its own trained tokens, and the gradients are summed over all ranks as they are without groups.
"""

from dataclasses import replace

import torch.distributed as dist

from schemas.config import TrainingConfig
from tasks.decoder.across import AcrossRanks, can_divide
from tasks.decoder.attention import LARGEST_HEAD
from tasks.decoder.latent_attention import LatentAttention
from tasks.decoder.mixers import DeltaNet, FurtherAttention, Mixer, SelfAttention
from tasks.training.distributed import rank, world_size
from tasks.training.engines.engine import Engine
from tasks.training.engines.fused import FusedEngine
from tasks.training.records import TrainingError


def share_tokens(engine: Engine, config: TrainingConfig) -> Engine:
    """Return the engine that computes this rank's slice of each batch; the engine itself where nothing is shared.

    Every rank has to call it.

    Raises:
        TrainingError: the model or its engine cannot do that.
    """
    size = config.context_parallel
    if size == 1 or world_size() == 1:
        return engine
    reason = _explain(engine, size)
    if reason is not None:
        raise TrainingError(f"training.context_parallel is {size}, and {reason}: set it to 1")
    assert isinstance(engine, FusedEngine)
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size(), size)]
    own = rank() % size
    attend = AcrossRanks(engine.decoder.attend, groups[rank() // size], own, size)
    return replace(
        engine,
        decoder=replace(engine.decoder, attend=attend),
        tokens_per_forward=engine.tokens_per_forward * size,
        room_tokens=engine.room_tokens * size,
        recorder=None,
        context=(own, size),
    )


def _explain(engine: Engine, size: int) -> str | None:
    """Return why ranks cannot share tokens, or None."""
    if not isinstance(engine, FusedEngine):
        return "the fused engine does not train this model"
    if engine.router_loss is not None:
        return "the router's loss (training.router_aux_loss_coef) needs all tokens in one place"
    for layer in engine.decoder.layers:
        found = _explain_mixer(layer.mixer, size)
        if found is not None:
            return found
    return None


def _explain_mixer(mixer: Mixer, size: int) -> str | None:
    """Return why ranks cannot share what a layer mixes, or None."""
    if isinstance(mixer, DeltaNet):
        return "gated DeltaNets go from token to token"
    if isinstance(mixer, FurtherAttention | LatentAttention):
        return "this family's attention is not divided yet"
    assert isinstance(mixer, SelfAttention)
    heads = mixer.heads
    if heads.size > LARGEST_HEAD or not can_divide(heads.num_query, heads.num_key_value, size):
        return f"its {heads.num_query} heads with {heads.num_key_value} of keys cannot be divided among {size} ranks"
    return None
