"""Which engine trains: the fused one where it knows the model and proves it on a trial, else the general one.

What is decided here is said in a line each, so that nobody has to guess why a training is slow.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from peft import PeftModel
from torch import nn

from schemas.config import TrainingConfig
from tasks.decoder.attention import attend_one_by_one
from tasks.decoder.decoder import LOGITS_BYTES, Decoder
from tasks.decoder.divided import DividedLayers
from tasks.decoder.float8 import check_expert_products, count_unquantized, quantize_decoder
from tasks.decoder.passes import PassRecorder, can_record
from tasks.decoder.passing_copies import pass_copies
from tasks.decoder.pieces import PIECE_TOKENS
from tasks.decoder.recognition import UnknownDecoderError, recognize_decoder
from tasks.out_of_memory import is_out_of_memory
from tasks.training.adamw import count_moment_bytes
from tasks.training.distributed import count_sharing
from tasks.training.engines.engine import Engine
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.general import GeneralEngine, build_engine
from tasks.training.engines.long_examples import IN_TURN
from tasks.training.engines.memory_fit import (
    LARGEST_FORWARD,
    MEASURED_PASSES,
    SMALL_LOGITS,
    SMALLEST_FULL_FORWARD,
    fit_all_ranks,
    fit_memory,
)
from tasks.training.engines.router_loss import find_router_loss
from tasks.training.engines.self_check import Trial, comparing_some, forget_grads, try_model, verify
from tasks.training.engines.shared_tokens import share_tokens
from tasks.training.engines.short_cuts import find_rope_limit, has_two_sets, take_short_cuts
from tasks.training.lora import collect_trained
from tasks.training.methods import find_base
from tasks.training.records import TrainingError
from tasks.training.sharding import is_sharded, is_zero
from tasks.training.token_table import TokenTable

# Tokens of a forward pass on a CPU: larger ones leave its caches.
CPU_TOKENS = 2048
# On a GPU, where its memory takes them; with fewer than the full ones, layers are rather recomputed.
GPU_TOKENS, FULL_TOKENS = LARGEST_FORWARD, SMALLEST_FULL_FORWARD
# Of two passes whose memory is measured; the rest is reckoned by them.
MEASURED_TOKENS = MEASURED_PASSES
# Bytes of logits at a time where layers run again.
LEAN_LOGITS_BYTES = SMALL_LOGITS
# Of long examples: tokens of a piece, and inputs that are on the device beside those that stay there.
LONG_PIECE, LONG_IN_TURN = PIECE_TOKENS, IN_TURN
# A layer of 8,192 tokens that runs again takes as long as the copies of so many layers take to be made twice.
_COPIES_A_LAYER = 6


def choose_engine(
    model: PeftModel,
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    config: TrainingConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    longest: int = 0,
) -> tuple[Engine, tuple[str, ...]]:
    """Return the engine and the lines that say what was chosen and why.

    Args:
        model: with what is trained.
        table: the examples.
        rows: of a step.
        config: the training section.
        device: of the training.
        dtype: of its products.
        longest: tokens of other examples that will go through it (held-out ones), where those are longer.

    Raises:
        TrainingError: the config insists on the fused engine, which does not know this model or adapter.
    """
    longest = max(longest, int(table.lengths.max()))
    engine, notes = _choose(model, table, rows, config, device=device, dtype=dtype, longest=longest)
    return share_tokens(engine, config), notes


def _choose(
    model: PeftModel,
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    config: TrainingConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    longest: int,
) -> tuple[Engine, tuple[str, ...]]:
    reason = _exclude_fused(config) or _exclude_long(model, config, longest)
    if not reason:
        divided = DividedLayers(device) if is_sharded(config) else None
        try:
            return _build_fused(model, table, rows, config, divided, device=device, dtype=dtype)
        except UnknownDecoderError as error:
            reason = str(error)
            forget_grads(model)
            if divided is not None:  # the general engine divides what lies in the host's memory
                divided.give_back()
                model.to("cpu")
        except (RuntimeError, MemoryError) as error:
            if config.is_lora or not is_out_of_memory(error):
                raise
            reason = f"out of memory while it was tried out ({str(error).partition(chr(10))[0]})"
            forget_grads(model)
    if config.engine == "fused" or config.base_weights == "fp8":
        raise TrainingError(
            f"the fused engine does not do this {type(find_base(model)).__name__}: {reason}; set "
            "training.engine to auto" + (" and training.base_weights to full" if config.base_weights == "fp8" else "")
        )
    return _build_general(model, table, rows, config, reason, device=device, dtype=dtype, longest=longest)


def _exclude_fused(config: TrainingConfig) -> str:
    """Return why a config leaves no choice but the general engine; nothing where it does."""
    if is_sharded(config) and config.strategy != "fsdp":
        return f"training.strategy is {config.strategy}"
    if is_sharded(config) and not config.is_lora:
        return f"training.strategy is {config.strategy} and training.method {config.method}"
    return "training.engine is general" if config.engine == "general" else ""


def _exclude_long(model: PeftModel, config: TrainingConfig, longest: int) -> str:
    """Return why the fused engine does not know the frequencies by which positions turn in long examples."""
    text = find_base(model).config.get_text_config()
    limit = find_rope_limit(text)
    if limit is None or longest <= limit or (has_two_sets(text) and config.context_parallel == 1):
        return ""
    return f"its positions turn with another frequency in rows above {limit:,} tokens, and an example has {longest:,}"


def _build_fused(
    model: PeftModel,
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    config: TrainingConfig,
    divided: DividedLayers | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[FusedEngine, tuple[str, ...]]:
    """Recognize the model, try it out against the model's own forward pass, and fit it into the memory.

    Raises:
        UnknownDecoderError: the model is not known, or does not do what was thought.
    """
    decoder, expected = _recognize(model, table, config, divided, device=device, dtype=dtype)
    if not config.is_lora:
        decoder.bind_gradients()  # where they are going to be: the trial does as the training
    router_loss = find_router_loss(find_base(model), config)
    most_tokens = _count_step_tokens(table, rows, config)
    with _comparing(model, config):
        decoder, notes = verify(model, decoder, table, expected, device, dtype)
    engine = FusedEngine(decoder, device, CPU_TOKENS, 0, LOGITS_BYTES, CPU_TOKENS, router_loss=router_loss)
    if config.base_weights == "fp8":
        del decoder
        engine, further = _quantize(engine, dtype)
        notes += further
    if config.tokens_per_pack != "auto":
        most_tokens = min(most_tokens, max(config.tokens_per_pack, int(table.group_lengths.max())))
    if device.type == "cuda":
        engine = fit_fused(engine, table, config, list(collect_trained(model).values()), most_tokens=most_tokens)
        # A recorded pass would hold the matrices of the slots in which they lay when it was recorded.
        may_record = engine.decoder.divided is None and not engine.num_recomputed and router_loss is None
        if may_record and can_record(engine.decoder, device):
            longest = int(table.lengths.max())
            recorder = PassRecorder(engine.decoder, device, longest=longest, logits_bytes=engine.logits_bytes)
            engine = replace(engine, recorder=recorder)
        if engine.decoder.attend is attend_one_by_one:
            notes.append(f"no FlashAttention for {dtype} here: examples are attended one by one, which is slower")
        if engine.decoder.ops.__name__.endswith("elementwise"):
            notes.append("Triton is missing: the work between the products is done in plain PyTorch, which is slower")
    else:
        layers = engine.num_layers if config.gradient_checkpointing else 0
        engine = replace(engine, tokens_per_forward=min(most_tokens, CPU_TOKENS), num_recomputed=layers)
    return engine, tuple(notes)


def fit_fused(
    engine: FusedEngine, table: TokenTable, config: TrainingConfig, trained: Sequence[nn.Parameter], *, most_tokens: int
) -> FusedEngine:
    """Return the fused engine with a forward pass that fits into the memory of every rank.

    Args:
        engine: on a GPU.
        table: the examples.
        config: of the training.
        trained: parameters.
        most_tokens: of a step, or of a pack.

    Raises:
        TrainingError: the longest example, or pair, does not fit with all that can be done.
    """
    longest = int(table.group_lengths.max())
    fit = partial(
        fit_memory,
        trained=trained,
        most_tokens=most_tokens,
        recompute=config.gradient_checkpointing,
        longest_pass=-(-longest // count_sharing(config)),
        moment_bytes=count_moment_bytes(config),
    )
    engine = save_copies(
        fit_all_ranks(fit(engine)),
        most_tokens,
        lambda leaner: fit_all_ranks(fit(leaner)),
        may_keep=config.gradient_checkpointing is None,
    )
    _refuse_too_long(engine, longest, config)
    return engine


def save_copies(
    engine: FusedEngine, most_tokens: int, fit: Callable[[FusedEngine], FusedEngine], *, may_keep: bool
) -> FusedEngine:
    """Keep the working copies of trained weights for two layers at a time where other things need their memory more.

    Args:
        engine: fitted into the memory with all of them.
        most_tokens: of a step.
        fit: fits an engine into the memory anew.
        may_keep: layers that run again now need not once there is memory for what they compute.
    """
    is_short = engine.num_recomputed and engine.tokens_per_forward < min(most_tokens, SMALLEST_FULL_FORWARD)
    is_slow = may_keep and engine.num_recomputed * _COPIES_A_LAYER > engine.num_layers
    if not (is_short or is_slow) or engine.decoder.divided is not None:
        return engine
    passing = pass_copies(engine.decoder)
    if passing is None:
        return engine
    leaner = replace(engine, decoder=replace(engine.decoder, divided=passing), num_recomputed=0)
    return fit(replace(leaner, piece_tokens=0, num_in_host=0, host=None, longest_fit=0))


def _refuse_too_long(engine: FusedEngine, longest: int, config: TrainingConfig) -> None:
    """Refuse an example for which all that an engine can do is not enough.

    Raises:
        TrainingError: it needs more than all of the memory, that included which is never planned for.
    """
    if not engine.longest_fit:
        return
    sharing = count_sharing(config)
    done = ", ".join(filter(None, ("every layer recomputed", engine.describe_long())))
    raise TrainingError(
        f"the longest example has {longest:,} tokens, and here examples of about {engine.longest_fit * sharing:,} fit "
        f"({done}): lower tokenization.max_length, have GPUs share examples by training.context_parallel, or train "
        "where the GPU or the host has more free memory"
    )


def _recognize(
    model: PeftModel,
    table: TokenTable,
    config: TrainingConfig,
    divided: DividedLayers | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Decoder, Trial]:
    """Return the decoder, and what the model's own forward pass gives on a trial.

    With divided weights that one gathers them as well: each layer was compared, bit by bit, with what is gathered of it
    when it was divided.
    """
    if divided is not None:
        decoder = recognize_decoder(model, divided=divided)
        return decoder, try_model(model, table, device, dtype, divided=divided)
    with _comparing(model, config):
        expected = try_model(model, table, device, dtype)
    return recognize_decoder(model, None if config.is_lora else dtype), expected


def _quantize(engine: FusedEngine, dtype: torch.dtype) -> tuple[FusedEngine, list[str]]:
    """Return the engine with weights in FP8, and a line where some stay as they are."""
    check_expert_products(engine.decoder)
    engine = replace(engine, decoder=quantize_decoder(engine.decoder))
    num_kept, num_products = count_unquantized(engine.decoder)
    if not num_kept:
        return engine, []
    return engine, [f"{num_kept} of {num_products} products stay in {dtype}: FP8 takes sizes of multiples of 16 only"]


def _build_general(
    model: PeftModel,
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    config: TrainingConfig,
    reason: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    longest: int,
) -> tuple[GeneralEngine, tuple[str, ...]]:
    """Try out which short cuts the model's own forward pass allows, and fit it into the memory."""
    place = next(model.parameters()).device  # the CPU still, where the base is going to be divided
    engine = build_engine(model, device=device, dtype=dtype, micro_batch=config.micro_batch, tokens_per_forward=1)
    with _comparing(model, config):
        engine, notes = take_short_cuts(engine, table, packing=config.packing, place=place, longest=longest)
    most_tokens = _count_step_tokens(table, rows, config)
    if engine.attend is None:
        most_tokens = engine.micro_batch * max(int(table.lengths[list(row)].sum()) for row in rows)
    elif config.tokens_per_pack != "auto":
        most_tokens = min(most_tokens, max(config.tokens_per_pack, int(table.group_lengths.max())))
    if device.type == "cpu" and engine.attend is not None:
        most_tokens = min(most_tokens, CPU_TOKENS)
    engine = replace(
        engine,
        tokens_per_forward=most_tokens,
        room_tokens=most_tokens,
        num_recomputed=engine.num_layers if config.gradient_checkpointing else 0,
        may_recompute=config.gradient_checkpointing is None,
        router_loss=find_router_loss(engine.base, config),
    )
    if not is_sharded(config):
        engine = fit_general(engine, table, config, list(collect_trained(model).values()))
    elif is_zero(config):
        engine = replace(engine, is_head_whole=False)
        if device.type == "cuda" and config.gradient_checkpointing is None:
            # Its passes cannot be measured before the first step: as small as the fused engine's smallest full ones.
            tokens = min(most_tokens, SMALLEST_FULL_FORWARD)
            engine = replace(engine, num_recomputed=engine.num_layers, tokens_per_forward=tokens, room_tokens=tokens)
    notes.insert(0, f"the general engine trains, which is slower than the fused one: {reason}")
    return engine, tuple(notes)


def _comparing(model: nn.Module, config: TrainingConfig) -> AbstractContextManager[None]:
    """Return the context of a trial: of a model's own weights, which are many, it compares some gradients."""
    return nullcontext() if config.is_lora else comparing_some(model)


def fit_general(
    engine: GeneralEngine, table: TokenTable, config: TrainingConfig, trained: Sequence[nn.Parameter]
) -> GeneralEngine:
    """Return the general engine with a forward pass that fits into the memory of every rank; on a CPU, as it is.

    Args:
        engine: whose tokens_per_forward is the most that a step could use, on its device, perhaps divided by FSDP.
        table: the examples.
        config: of the training.
        trained: parameters.
    """
    if engine.device.type != "cuda":
        return engine
    return fit_all_ranks(
        fit_memory(
            engine,
            trained=trained,
            most_tokens=engine.tokens_per_forward,
            recompute=config.gradient_checkpointing,
            longest=int(table.lengths.max()),
            moment_bytes=count_moment_bytes(config),
        )
    )


def _count_step_tokens(table: TokenTable, rows: Sequence[Sequence[int]], config: TrainingConfig) -> int:
    """Return the most tokens that a step can hold."""
    lengths = sorted((int(table.lengths[list(row)].sum()) for row in rows), reverse=True)
    return sum(lengths[: config.rows_per_step])
