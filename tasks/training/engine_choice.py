"""Which engine trains: the fused one where it knows the model and proves it on a trial, else the general one.

What is decided here is said in a line each, so that nobody has to guess why a training is slow.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from schemas.config import TrainingConfig
from tasks.decoder.attention import attend_one_by_one
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.passes import PassRecorder, can_record
from tasks.decoder.recognition import UnknownDecoderError, quantize_decoder, recognize_decoder
from tasks.training.distributed import gather
from tasks.training.engines import Engine, FusedEngine, GeneralEngine, recompute_layers
from tasks.training.lora import collect_trained
from tasks.training.loss import isolates_packed, supports_trained_only
from tasks.training.memory_fit import fit_memory
from tasks.training.records import TrainingError
from tasks.training.self_check import try_model, verify
from tasks.training.sharding import is_sharded
from tasks.training.token_table import TokenTable

# Tokens of a forward pass on a CPU: larger ones leave its caches.
CPU_TOKENS = 2048


def choose_engine(
    model: PeftModel,
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    config: TrainingConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Engine, tuple[str, ...]]:
    """Return the engine and the lines that say what was chosen and why.

    Raises:
        TrainingError: the config insists on the fused engine, which does not know this model or adapter.
    """
    reason = "training.engine is general"
    if is_sharded(config):
        reason = f"training.strategy is {config.strategy}"
    elif config.engine != "general":
        try:
            return _build_fused(model, table, rows, config, device=device, dtype=dtype)
        except UnknownDecoderError as error:
            reason = str(error)
    if config.engine == "fused" or config.base_weights == "fp8":
        raise TrainingError(
            f"the fused engine does not do this {type(model.get_base_model()).__name__}: {reason}; set "
            "training.engine to auto" + (" and training.base_weights to full" if config.base_weights == "fp8" else "")
        )
    return _build_general(model, table, config, reason, device=device, dtype=dtype)


def _build_fused(
    model: PeftModel,
    table: TokenTable,
    rows: Sequence[Sequence[int]],
    config: TrainingConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[FusedEngine, tuple[str, ...]]:
    """Recognize the model, try it out against the model's own forward pass, and fit it into the memory.

    Raises:
        UnknownDecoderError: the model is not known, or does not do what was thought.
    """
    expected = try_model(model, table, device, dtype)
    decoder = recognize_decoder(model)
    most_tokens = _count_step_tokens(table, rows, config)
    decoder, notes = verify(model, decoder, table, expected, device, dtype)
    engine = FusedEngine(decoder, device, CPU_TOKENS, 0, LOGITS_BYTES, CPU_TOKENS)
    if config.base_weights == "fp8":
        engine = replace(engine, decoder=quantize_decoder(decoder))
        del decoder
    if config.tokens_per_pack != "auto":
        most_tokens = min(most_tokens, max(config.tokens_per_pack, int(table.lengths.max())))
    if device.type == "cuda":
        num_parameters = sum(parameter.numel() for parameter in collect_trained(model).values())
        engine = fit_memory(
            engine, num_parameters=num_parameters, most_tokens=most_tokens, recompute=config.gradient_checkpointing
        )
        # Each rank makes all of a step's batches and takes its share: they have to be the same everywhere.
        needs = gather((engine.tokens_per_forward, -engine.num_recomputed, engine.logits_bytes, engine.room_tokens))
        tokens, kept, logits_bytes, room = (min(values) for values in zip(*needs, strict=True))
        engine = replace(
            engine, tokens_per_forward=tokens, num_recomputed=-kept, logits_bytes=logits_bytes, room_tokens=room
        )
        if not engine.num_recomputed and can_record(engine.decoder, device):
            longest = int(table.lengths.max())
            recorder = PassRecorder(engine.decoder, device, longest=longest, logits_bytes=logits_bytes)
            engine = replace(engine, recorder=recorder)
        if engine.decoder.attend is attend_one_by_one:
            notes.append(f"no FlashAttention for {dtype} here: examples are attended one by one, which is slower")
        if engine.decoder.ops.__name__.endswith("elementwise"):
            notes.append("Triton is missing: the work between the products is done in plain PyTorch, which is slower")
    else:
        layers = len(decoder.layers) if config.gradient_checkpointing else 0
        engine = replace(engine, tokens_per_forward=min(most_tokens, CPU_TOKENS), num_recomputed=layers)
    return engine, tuple(notes)


def _build_general(
    model: PeftModel,
    table: TokenTable,
    config: TrainingConfig,
    reason: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[GeneralEngine, tuple[str, ...]]:
    """Try out which short cuts the model's own forward pass allows."""
    if config.gradient_checkpointing:
        recompute_layers(model)
    notes = [f"the general engine trains, which is slower than the fused one: {reason}"]
    model.eval()
    place = next(model.parameters()).device  # the CPU still, where the base is going to be divided
    context: Any = nullcontext() if dtype == torch.float32 else torch.autocast(place.type, dtype=dtype)
    with context:
        keeps_packs = not config.packing or isolates_packed(model, table, place)
        trained_only = supports_trained_only(model, table, place)
    model.train()
    if not keeps_packs:
        notes.append(
            "this model does not keep packed examples apart: a pack's examples are padded side by side instead"
        )
    if not trained_only:
        notes.append("this model's output head cannot be computed at chosen positions alone: training is slower")
    base: Any = model.get_base_model()
    may_recompute = config.gradient_checkpointing is None and bool(base.supports_gradient_checkpointing)
    return (
        GeneralEngine(model, device, dtype, config.micro_batch, trained_only, keeps_packs, may_recompute),
        tuple(notes),
    )


def _count_step_tokens(table: TokenTable, rows: Sequence[Sequence[int]], config: TrainingConfig) -> int:
    """Return the most tokens that a step can hold."""
    rows_per_step = config.micro_batch * config.gradient_accumulation_steps
    lengths = sorted((int(table.lengths[list(row)].sum()) for row in rows), reverse=True)
    return sum(lengths[:rows_per_step])
