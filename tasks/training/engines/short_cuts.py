"""What makes a model's own forward pass faster, each tried out before the training and left out where it is not exact.

- the head at trained positions only, some at a time (`chunked_head`)
- examples end to end in one row, through an attention of variable lengths (`flat_attention`)
- the adapters of routed experts beside their frozen products (`expert_adapters`)
- Liger's kernels, where that package is installed (`liger`)

The trial's loss and gradients are compared with those of each example alone, with the model's own attention and whole
head (`self_check`). What a short trial cannot see is read from the masks and from the config.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from tasks.decoder.attention import Attention, Segments, attend_one_by_one
from tasks.decoder.delta_rule import find_delta_rules
from tasks.families.packing import find_row_limit
from tasks.out_of_memory import is_out_of_memory
from tasks.training.batches import form_batch
from tasks.training.engines.base_dropout import find_dropout
from tasks.training.engines.expert_adapters import use_factored_adapters
from tasks.training.engines.flat_attention import FlatLayout, find_kinds, laid_out, use_flat_attention
from tasks.training.engines.flat_delta_net import find_delta_nets, use_flat_delta_nets
from tasks.training.engines.general import GeneralEngine, autocast_to
from tasks.training.engines.liger import use_liger
from tasks.training.engines.loss import check_causal, cut_trial, isolates_packed, sum_token_losses
from tasks.training.engines.self_check import Trial, compare, forget_grads, try_model
from tasks.training.token_table import TokenTable

# Positions turn with another frequency once a row is longer than the model was trained for.
_LENGTH_DEPENDENT_ROPES = {"dynamic", "longrope"}


def take_short_cuts(
    engine: GeneralEngine, table: TokenTable, *, packing: bool, place: torch.device, longest: int = 0
) -> tuple[GeneralEngine, list[str]]:
    """Return the engine with the short cuts that its model allows, and a line for each that it does not.

    Args:
        engine: the plain one, see `build_engine`.
        table: the examples.
        packing: whether rows hold several examples.
        place: where the model is: its device, or the CPU still, where it is going to be divided.
        longest: tokens of other examples that will go through it, where those are longer.

    Raises:
        TrainingError: the model sees later tokens than the one that it predicts the next of.
    """
    model, notes = engine.model, []
    # Where the model is not on its device yet, the trial takes the attention that is exact anywhere.
    kinds = find_kinds(engine.device, engine.dtype)
    tried = replace(engine, device=place)
    trial = Checker(try_model(model, table, place, engine.dtype, drops=False), cut_trial(table, count=2))
    model.eval()
    with autocast_to(engine.dtype, place):
        check_causal(model, table, place)
    if reason := trial.refuse(replace(tried, has_chunked_head=True)):
        notes.append(f"this model's output head cannot be computed at chosen positions alone ({reason}): slower")
    else:
        engine, tried = replace(engine, has_chunked_head=True), replace(tried, has_chunked_head=True)
    longest = max(longest, int(table.lengths.max()))
    if changes_with_length(engine.base.config.get_text_config(), longest):
        model.train()
        notes.append(f"this model's positions depend on the row's length above {longest:,} tokens: one example a pass")
        return replace(engine, micro_batch=1, keeps_packs=False), notes
    limit = find_row_limit(engine.base.config.get_text_config())
    if limit is not None and int(table.lengths.sum()) > limit[0]:
        model.train()
        notes.append(f"examples are padded side by side, each in a row of its own, which is slower: {limit[1]}")
        return replace(engine, keeps_packs=False), notes
    kind, reason = _choose_attention(tried, trial, kinds if place == engine.device else (attend_one_by_one,), longest)
    if kind is None:
        notes.append(f"examples are padded side by side, which is slower than end to end: {reason}")
        with autocast_to(engine.dtype, place):
            keeps_packs = not packing or isolates_packed(model, table, place)
        if not keeps_packs:
            notes.append("this model does not keep packed examples apart: a pack's examples are padded side by side")
        engine = replace(engine, keeps_packs=keeps_packs)
    else:
        engine = replace(engine, attend=kind if place == engine.device else kinds[0])
    if place == engine.device and (note := _factor_adapters(engine, trial)):
        notes.append(note)
    if place == engine.device and (note := use_liger(engine.base, lambda: trial.refuse(engine))):
        notes.append(note)
    model.train()
    return engine, notes


@dataclass(frozen=True)
class Checker:
    """Compares engines with what the plain forward pass gives on two short pieces of the data."""

    expected: Trial
    pieces: TokenTable

    def refuse(self, engine: GeneralEngine) -> str:
        """Return why an engine is not exact, or nothing where it is."""
        try:
            compare(engine.model, engine, self.pieces, self.expected, engine.dtype)
        except Exception as error:  # a family's code, or a kernel that does not compile here, raises what it likes
            forget_grads(engine.model)
            if is_out_of_memory(error):
                raise
            return str(error).partition("\n")[0] or type(error).__name__
        return ""


def changes_with_length(config: Any, longest: int) -> bool:
    """Say whether an example's positions would depend on the other examples of its row.

    Args:
        config: of the text decoder.
        longest: tokens of the longest example.
    """
    limit = find_rope_limit(config)
    return limit is not None and longest > limit


def find_rope_limit(config: Any) -> int | None:
    """Return the tokens of a row above which positions turn with another frequency; None where they never do."""
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPES:
            found = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return int(found or config.max_position_embeddings)
    return None


def has_two_sets(config: Any) -> bool:
    """Say whether there are two sets of frequencies (LongRoPE), of which each example's length chooses one."""
    ropes = getattr(config, "rope_parameters", None) or {}
    parts = [ropes, *(part for part in ropes.values() if isinstance(part, dict))]
    return {part.get("rope_type") for part in parts} & _LENGTH_DEPENDENT_ROPES == {"longrope"}


def _factor_adapters(engine: GeneralEngine, trial: Checker) -> str:
    """Take the adapters of routed experts apart from their weights; return why not, or nothing."""
    give_back = use_factored_adapters(engine.model)
    if give_back is None:
        return ""
    reason = trial.refuse(engine)
    if reason:
        give_back()
        return f"each pass makes a copy of all experts' weights with the adapter added, which is slower: {reason}"
    return ""


def _choose_attention(
    engine: GeneralEngine, trial: Checker, kinds: tuple[Attention, ...], longest: int
) -> tuple[Attention | None, str]:
    """Have the model attend to examples end to end; return by what, or nothing and why not."""
    if found := find_dropout(engine.base):
        return None, f"its own dropout is on ({', '.join(sorted(found))})"
    nets = find_delta_nets(engine.base)
    has_kernels = bool(nets) and len(find_delta_rules(engine.device, engine.dtype)) > 1
    reason = ""
    for is_plain in (False, True) if has_kernels else (False,):
        with ExitStack() as given_back:
            try:
                given_back.callback(use_flat_attention(engine.base))
                given_back.callback(use_flat_delta_nets(nets, is_plain=is_plain))
                _check_masks(engine, trial.pieces, longest)
            except Exception as error:  # likewise
                if is_out_of_memory(error):
                    raise
                return None, str(error).partition("\n")[0]
            for kind in kinds:
                reason = trial.refuse(replace(engine, attend=kind))
                if not reason:
                    given_back.pop_all()  # it stays
                    return kind, ""
    return None, reason


@torch.no_grad()
def _check_masks(engine: GeneralEngine, pieces: TokenTable, longest: int) -> None:
    """Raise FlatAttentionError where a mask, up to the longest example, is not what the attention is told."""
    batch = form_batch(pieces, [[0]]).move(engine.device)
    num_tokens = batch.input_ids.shape[1]
    borders = torch.tensor([0, num_tokens], dtype=torch.int32, device=engine.device)
    layout = FlatLayout(Segments(borders, (num_tokens,)), attend_one_by_one, checked_length=longest)
    with autocast_to(engine.dtype, engine.device), laid_out(layout):
        sum_token_losses(engine.model, batch)
