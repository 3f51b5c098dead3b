"""A training before it is done: what goes through the model, how long that takes, and the memory it needs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from schemas.config import TrainingConfig
from tasks import speeds
from tasks.decoder.passes import RecordingRule, count_recorded, round_longest
from tasks.host_memory import HOST_SHARE, read_free_host
from tasks.models import choose_device, choose_dtype
from tasks.planning.estimates import Estimate
from tasks.planning.kept import count_kept
from tasks.planning.memory import MemoryNeed, count_flop, count_need, read_capacity
from tasks.planning.peaks import Peak, count_rank, fit_long, foresee_resident, predict_peak
from tasks.planning.times import PlannedTraining, StageTime, describe_kind, estimate_stage, estimate_steps
from tasks.planning.work import ExampleLengths, PassLayout, foresee_layout, foresee_work, read_examples
from tasks.speeds import Speed
from tasks.training.engines.choice import FULL_TOKENS, GPU_TOKENS, MEASURED_TOKENS
from tasks.training.pace import (
    AROUND,
    CHECKPOINTS,
    FIRST_STEP,
    HELD_OUT,
    STEPS,
    count_tokens,
    describe_conditions,
    describe_model,
    measure_products,
)
from tasks.training.preparation import NUM_EVALS

_SHARE = 0.9
"""Of a device's memory that a training plans for; see memory_fit."""
_FORWARD_PART, _UNMEASURED = 1 / 3, 1.5
"""Of a training's time for a token, that of its forward pass, of three products of like size; and the bar of that."""
_BY_WORK = (HELD_OUT, AROUND)
"""What of other models goes by the useful work of a token: a larger one is read and run for longer."""
_NOTHING = Estimate(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class TrainingPlan:
    """What is known of a training."""

    times: tuple[StageTime, ...]
    peak_bytes: Estimate | None
    """The highest use of memory; None where it cannot be counted, and no training of this model was measured here."""
    work: dict[str, float]
    """Counts of all steps, with the sizes of the model."""
    peak_source: str = ""
    """By what the highest use of memory is known."""


@dataclass(frozen=True)
class _Question:
    """What a training is asked about."""

    folder: Path
    config: TrainingConfig
    known: Sequence[Speed]
    device: torch.device
    model: dict[str, float]
    needs: dict[str, MemoryNeed] = field(default_factory=dict)
    """By the settings: building a large model's skeleton takes a quarter of a second."""

    def count_need(self, config: TrainingConfig) -> MemoryNeed:
        """Return the memory of a config before its first pass."""
        key = config.model_dump_json()
        if key not in self.needs:
            dtype = choose_dtype(config.precision, self.device)
            self.needs[key] = count_need(self.folder, config, dtype=dtype, longest=1)
        return self.needs[key]

    def count_kept(self, config: TrainingConfig) -> float:
        """Return the bytes of a token that a GPU's layers keep; 0 where these cannot be counted."""
        is_gpu = self.kind == "cuda"
        return count_kept(self.folder, config, choose_dtype(config.precision, self.device)) if is_gpu else 0.0

    @property
    def kind(self) -> str:
        return "cuda" if self.device.type == "cuda" else "cpu"

    def choose(self, *stages: str) -> list[Speed]:
        """Return the lines of stages on this device."""
        name = speeds.name_device()
        return [speed for speed in self.known if speed.stage in stages and speed.device == name]


def plan_training(
    folder: Path,
    tokens: Path,
    config: TrainingConfig,
    *,
    seed: int,
    known: Sequence[Speed],
    seen_tokens: Estimate,
    share: float = 1.0,
) -> TrainingPlan:
    """Return the times of a training's parts, and its memory.

    Args:
        folder: of the base model.
        tokens: folder of examples.
        config: the training section.
        seed: of the run.
        known: what was noted here.
        seen_tokens: over all steps, without padding.
        share: part of all conversations that was tokenized.
    """
    question = _Question(folder, config, known, choose_device(), describe_model(folder))
    examples = read_examples(tokens / "train.parquet", config, share=share)
    shape, settings = speeds.describe_shape(folder), describe_conditions(config)
    own = [speed for speed in question.choose(STEPS) if speed.shape == shape and speed.work]
    engine, is_flat = _foresee_engine(own, config)
    held_out = count_tokens(tokens / "eval.parquet")
    work = _foresee(question, examples, own, engine=engine, is_flat=is_flat, seed=seed, num_held_out=held_out)
    flop = count_flop(folder, config)
    asked = PlannedTraining(
        device=speeds.name_device(), is_gpu=question.kind == "cuda", shape=shape, settings=settings, engine=engine,
        tokens=seen_tokens, work=work, flop_per_token=flop,
    )  # fmt: skip
    steps = StageTime(STEPS, *estimate_steps(question.choose(STEPS), asked))
    peak = None
    if work and (own or question.count_kept(config)):
        here = foresee_resident([speed.work for speed in question.choose(STEPS) if speed.work])
        asked_peak = _describe_peak(question, config, {**work, "resident": here})
        seen = _list_peaks(question, own)
        if question.kind == "cuda" and engine.startswith("fused") and config.gradient_checkpointing is not False:
            room, host = _SHARE * read_capacity(question.device), HOST_SHARE * read_free_host()
            asked_peak = fit_long(seen, asked_peak, room_bytes=room, host_bytes=host / config.num_own_processes)
        peak = predict_peak(seen, asked_peak, device=question.kind)
    source = "by earlier trainings of this model here" if own else "counted on the model without its values"
    return TrainingPlan((steps, *_list_others(question, asked, steps.seconds, held_out)), peak, work, source)


def _foresee_engine(own: Sequence[Speed], config: TrainingConfig) -> tuple[str, bool]:
    """Return which engine will train, and whether it lays examples end to end: as the last time, or as it should."""
    for speed in reversed(own):
        values = json.loads(speed.settings)
        if (values.get("engine"), values.get("strategy")) == (config.engine, config.strategy):
            return speed.engine, bool(speed.work["flat"])
    is_divided = config.strategy != "ddp" and config.num_ranks > 1
    is_general = config.engine == "general" or (is_divided and (config.strategy != "fsdp" or not config.is_lora))
    return "general engine" if is_general else "fused engine", True


def _foresee(
    question: _Question,
    examples: ExampleLengths,
    own: Sequence[Speed],
    *,
    engine: str,
    is_flat: bool,
    seed: int,
    num_held_out: int,
) -> dict[str, float]:
    """Return the work of all steps, in passes that fit into the memory; nothing of a model without sizes."""
    if not question.model:
        return {}
    config = question.config
    flop, num_trained = count_flop(question.folder, config), question.count_need(config).num_trained
    sizes = measure_products(question.model, config, flop, num_trained)
    sizes["sharing"] = float(config.context_parallel)

    def lay(layout: PassLayout, room: int) -> dict[str, float]:
        if question.kind == "cuda" and engine.startswith("fused") and _can_record(own, config, layout):
            most = count_recorded(int(sizes["layers"]), sizes["flop"])
            longest = round_longest(int(examples.table.lengths.max(initial=0)))
            layout = replace(layout, recording=RecordingRule(most, longest, room))
        held_out = float(min(num_held_out, room))
        return {**foresee_work(examples, config, layout, seed=seed), **sizes, "held_out_pass": held_out}

    whole = foresee_layout(examples, config, is_gpu=question.kind == "cuda", is_flat=is_flat)
    if question.kind != "cuda":
        return lay(whole, whole.tokens_per_forward)
    settings = describe_conditions(config)
    for speed in reversed(own):
        if speed.settings == settings:
            room = min(whole.tokens_per_forward, int(speed.work["room"]))
            layout = replace(whole, tokens_per_forward=room, recomputed=speed.work["recomputed"])
            return lay(layout, int(speed.work["room"]))
    layout = whole
    for part in {None: (0.0, 1.0), False: (0.0,), True: (1.0,)}[config.gradient_checkpointing]:
        layout = replace(whole, recomputed=part)
        layout = replace(layout, tokens_per_forward=_fit_tokens(question, own, layout, sizes))
        if layout.tokens_per_forward >= min(whole.tokens_per_forward, FULL_TOKENS * config.context_parallel):
            break
    return lay(layout, _fit_tokens(question, own, replace(layout, tokens_per_forward=GPU_TOKENS), sizes))


def _can_record(own: Sequence[Speed], config: TrainingConfig, layout: PassLayout) -> bool:
    """Say whether the fused engine records small passes: of this model, as it did the last time that one was small."""
    is_plain = config.context_parallel == 1 and not config.is_paired and not config.sweep.is_on
    if layout.recomputed or not is_plain or (config.strategy != "ddp" and config.num_ranks > 1):
        return False
    for speed in reversed(own):
        work = speed.work
        if "replayed" not in work or work["recomputed"]:  # of an earlier release, or of passes that are never recorded
            continue
        if 2 * work["tokens"] / work["passes"] <= count_recorded(int(work["layers"]), work["flop"]):
            return work["replayed"] > 0
    return True


def _fit_tokens(question: _Question, own: Sequence[Speed], layout: PassLayout, sizes: dict[str, float]) -> int:
    """Return the tokens of a pass that fit into the memory: as the last training like it found, or by its peaks."""
    most = layout.tokens_per_forward
    kind = json.loads(describe_conditions(question.config))
    for speed in reversed(own):
        other = json.loads(speed.settings)
        is_alike = all(other.get(name) == kind[name] for name in ("method", "precision", "base_weights", "optimizer"))
        if is_alike and speed.work["recomputed"] == layout.recomputed and speed.work["room"]:
            own_room = int(speed.work["room"] / speed.work.get("sharing", 1.0))
            return min(most, own_room * question.config.context_parallel)
    peaks = _list_peaks(question, own)

    def measure(tokens: int) -> float:
        work = {**sizes, "largest_pass": float(tokens), "recomputed": layout.recomputed, "resident": 0.0}
        peak = _describe_peak(question, question.config, work)
        return predict_peak(peaks, peak, device="cuda").value - peak.fixed_bytes

    fixed = _describe_peak(question, question.config, {}).fixed_bytes
    free = _SHARE * (read_capacity(question.device) - fixed)
    # As the training reckons: two small passes, and what they take on each further token.
    small, large = (measure(tokens) for tokens in MEASURED_TOKENS)
    tokens = int(MEASURED_TOKENS[0] + (free - small) * (MEASURED_TOKENS[1] - MEASURED_TOKENS[0]) / (large - small))
    return most if tokens >= most else max(512, tokens // 512 * 512)


def _list_peaks(question: _Question, own: Sequence[Speed]) -> list[Peak]:
    """Return the memory of earlier trainings of the model; those of one's own settings alone, where there are some."""
    peaks = []
    for speed in own[-20:]:
        try:
            config = TrainingConfig.model_validate(json.loads(speed.settings))
            peak = _describe_peak(question, config, speed.work)
        except ValueError:  # of a release with other settings
            continue
        peaks.append(replace(peak, peak_bytes=speed.peak_memory_bytes))
    return peaks


def _describe_peak(question: _Question, config: TrainingConfig, work: dict[str, float]) -> Peak:
    dtype = choose_dtype(config.precision, question.device)
    fixed, kept = question.count_need(config).fixed_bytes, question.count_kept(config)
    return Peak(fixed, dtype.itemsize, count_rank(config), work, kept_bytes=kept)


def _list_others(
    question: _Question, asked: PlannedTraining, steps: Estimate | None, num_held_out: int
) -> list[StageTime]:
    """Return the times of what is around a training's steps."""
    config, kind, work = question.config, describe_kind(asked.settings, asked.engine), asked.work
    num_steps = int(work.get("steps", 1))

    def is_same(speed: Speed) -> bool:
        return speed.shape == asked.shape and speed.settings == asked.settings

    def is_alike(speed: Speed) -> bool:
        return speed.shape == asked.shape and describe_kind(speed.settings, speed.engine) == kind

    def is_own(speed: Speed) -> bool:
        return speed.shape == asked.shape

    is_old = not any(speed.work for speed in question.choose(STEPS))
    flop = {speed.shape: speed.flop_per_unit for speed in question.choose(STEPS) if speed.flop_per_unit}
    matches: tuple[Any, ...] = (is_same, is_alike, is_own, lambda speed: True)

    def time(stage: str, units: float) -> StageTime:
        if not units:
            return StageTime(stage, _NOTHING, "none before the end" if stage == CHECKPOINTS else "no row is held out")
        lines, whole = question.choose(stage), units
        if stage in _BY_WORK and not any(is_own(speed) for speed in lines) and asked.flop_per_token:
            lines = [replace(speed, units=speed.units * flop[speed.shape]) for speed in lines if speed.shape in flop]
            whole *= asked.flop_per_token
        found, told = estimate_stage(lines, whole, matches=matches)
        if found is None and stage == HELD_OUT and steps is not None and not is_old:
            pace = steps.scale(_FORWARD_PART / asked.tokens.value)  # a step's pass is forward and back
            return StageTime(stage, pace.scale(units).widen(_UNMEASURED), "not measured: a third of a step's pace")
        if found is None and question.choose(AROUND) and stage != AROUND:
            # Earlier releases noted it with what is around the steps, or no training came so far.
            return StageTime(stage, _NOTHING, "not noted apart yet")
        return StageTime(stage, found, told)

    every = config.eval_every_steps or math.ceil(num_steps / NUM_EVALS)
    num_evals = math.ceil(num_steps / every)
    num_saves = (num_steps - 1) // config.checkpoint_every_steps
    return [
        time(FIRST_STEP, 1),
        time(HELD_OUT, num_evals * num_held_out),
        time(CHECKPOINTS, num_saves * work.get("trained", 1.0)),
        time(AROUND, 1),
    ]
