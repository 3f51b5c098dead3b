"""`sft plan`: what a run of a config will do, before anything heavy starts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flows.plan_data import Found, Kept, find_data, find_kept
from flows.preflight import check_run
from flows.run_pace import REST
from schemas.artifacts import ModelRef
from schemas.config import RunConfig
from tasks import speeds, storage, tracking
from tasks.evaluation.task import describe_effort
from tasks.host_memory import HOST_SHARE, read_free_host
from tasks.models import choose_device, choose_dtype
from tasks.planning.estimates import Estimate
from tasks.planning.memory import (
    MemoryNeed,
    Option,
    count_need,
    find_longest,
    fits,
    list_options,
    needs_host,
    read_capacity,
)
from tasks.planning.sizes import Sizes
from tasks.planning.times import StageTime, add_up, estimate_stage
from tasks.planning.trainings import TrainingPlan, plan_training
from tasks.planning.trial import measure_training
from tasks.registry.bases import find_base_model
from tasks.speeds import Speed
from tasks.training.pace import STEPS, describe_conditions
from tasks.training.process.launch import check_machine, settle_processes
from tasks.training.records import TrainingError

_CACHED = "in the cache"


@dataclass(frozen=True)
class Memory:
    """What the training needs on each device, and what there is."""

    need: MemoryNeed
    capacity_bytes: int
    is_enough: bool
    """For weights, optimizer and the smallest pass; the training fits larger ones into what is left."""
    options: tuple[Option, ...]
    """Changes with which it fits; empty where it does."""
    peak_bytes: Estimate | None
    """The highest use, counted, or by earlier trainings of this model here; None where there is neither."""
    seen_peak_bytes: int | None
    """The highest use of an earlier training of this model with these settings here."""
    needs_host: bool = False
    """The training keeps layers' inputs in the host's memory, at least so that it can begin."""
    longest_fit: int | None = None
    """Tokens of the longest example that fits by what is counted, where the longest one does not; 0: none does."""
    peak_source: str = ""
    """By what the highest use is known."""


@dataclass(frozen=True)
class RunPlan:
    """What will happen."""

    name: str
    base_model: str
    dataset: str
    problems: tuple[str, ...]
    """What the run would refuse; empty means that it would train."""
    warnings: tuple[str, ...]
    rows: dict[str, int]
    num_eval_examples: int
    sizes: Sizes
    device: str
    num_processes: int
    num_sharing: int
    """Processes that share each example's tokens."""
    num_idle_gpus: int
    memory: Memory
    cached: tuple[str, ...]
    """Stages whose results this machine has kept."""
    times: tuple[StageTime, ...]
    seconds: Estimate | None
    """Of the whole run; None where the time of a stage is unknown."""
    rate: float | None
    """Price of an hour of the machine."""

    @property
    def price(self) -> Estimate | None:
        """In the unit of the rate."""
        return None if self.rate is None or self.seconds is None else self.seconds.scale(self.rate / 3600)

    @property
    def known_seconds(self) -> Estimate:
        """Of the stages whose time is known."""
        known = add_up([time for time in self.times if time.seconds is not None])
        assert known is not None
        return known

    def as_values(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        price = self.price
        return {"ok": not self.problems, **asdict(self), "price": None if price is None else asdict(price)}


def plan_run(
    config: RunConfig,
    *,
    most: int,
    rate: float | None = None,
    measures: bool = False,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> RunPlan:
    """Find out what a run of a config will do.

    Args:
        config: of the run.
        most: conversations that are tokenized; of more, so many are drawn.
        rate: price of an hour.
        measures: do a few steps of the training, and note how fast they were.
        on_phase: is told what is being done.

    Raises:
        ValueError: model or dataset cannot be used at all.
    """
    config = config.model_copy(update={"training": settle_processes(config.training)})
    on_phase("Looking at the base model")
    base_model = find_base_model(config.model)
    folder = tracking.resolve(base_model)
    advice = check_run(folder, config)
    on_phase("Looking for kept results")
    kept = find_kept(config, base_model)
    with storage.new_folder() as place:
        on_phase("Counting rows and tokens")
        found = find_data(config, folder, kept, place, most=most)
        try:
            check_machine(config.training)
        except TrainingError as error:
            found = replace(found, problems=(*found.problems, str(error)))
        if measures and not found.problems:
            on_phase("Training a few steps")
            measure_training(folder, found.tokens, place / "trial", config.training, seed=config.seed)
        return _put_together(config, base_model, kept, found, advice, rate)


def _put_together(
    config: RunConfig, base_model: ModelRef, kept: Kept, found: Found, advice: tuple[str, ...], rate: float | None
) -> RunPlan:
    folder, device = tracking.resolve(base_model), choose_device()
    known = speeds.read_speeds()
    training = plan_training(
        folder,
        found.tokens,
        config.training,
        seed=config.seed,
        known=known,
        seen_tokens=found.sizes.seen_tokens,
        share=found.share,
    )
    times = tuple(_list_times(config, folder, kept, found, known, training))
    memory = _plan_memory(config, folder, found.sizes, device, known, training)
    problems = list(found.problems)
    if not memory.is_enough:
        problems.append(
            f"the training needs at least {memory.need.least_bytes / 2**30:.1f} GiB of {speeds.name_device()}'s "
            f"{memory.capacity_bytes / 2**30:.1f} GiB, of which nine tenths are planned for"
            + (
                f"; the longest example has {found.sizes.longest:,} tokens, and by what is counted none above "
                f"{memory.longest_fit:,} fits"
                if memory.longest_fit
                else ""
            )
        )
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    return RunPlan(
        name=config.name,
        base_model=base_model.name,
        dataset=config.data.source,
        problems=tuple(problems),
        warnings=(*advice, *found.warnings),
        rows=found.rows,
        num_eval_examples=min(found.num_eval_examples, config.evaluation.max_examples),
        sizes=found.sizes,
        device=speeds.name_device(),
        num_processes=config.training.num_own_processes,
        num_sharing=config.training.context_parallel,
        num_idle_gpus=_count_idle(config, num_gpus),
        memory=memory,
        cached=kept.stages,
        times=times,
        seconds=add_up(times),
        rate=rate,
    )


def _count_idle(config: RunConfig, num_gpus: int) -> int:
    """Return how many GPUs are idle that further processes could take."""
    idle, sharing = max(0, num_gpus - config.training.num_own_processes), config.training.context_parallel
    return idle // sharing * sharing


def _plan_memory(
    config: RunConfig, folder: Path, sizes: Sizes, device: torch.device, known: list[Speed], training: TrainingPlan
) -> Memory:
    capacity = read_capacity(device)
    conditions: dict[str, Any] = {
        "dtype": choose_dtype(config.training.precision, device),
        "longest": sizes.longest,
        "host_bytes": int(HOST_SHARE * read_free_host()) if device.type == "cuda" else 0,
    }
    need = count_need(folder, config.training, **conditions)
    shape, settings = speeds.describe_shape(folder), describe_conditions(config.training)
    peaks = [
        speed.peak_memory_bytes
        for speed in known
        if (speed.stage, speed.device, speed.shape, speed.settings) == (STEPS, speeds.name_device(), shape, settings)
    ]
    is_enough = fits(need, capacity)
    return Memory(
        need,
        capacity,
        is_enough,
        list_options(folder, config.training, capacity_bytes=capacity, **conditions),
        training.peak_bytes,
        max(peaks, default=None),
        needs_host(need, capacity),
        None if is_enough else find_longest(folder, config.training, capacity_bytes=capacity, **conditions),
        training.peak_source,
    )


def _list_times(
    config: RunConfig, folder: Path, kept: Kept, found: Found, known: list[Speed], training: TrainingPlan
) -> list[StageTime]:
    """Return what is known of the time of each stage, in their order."""
    device, shape = speeds.name_device(), speeds.describe_shape(folder)
    effort = describe_effort(config.evaluation)
    of = {stage: [speed for speed in known if speed.stage == stage] for stage in {speed.stage for speed in known}}

    def here(speed: Speed) -> bool:
        return speed.device == device

    def of_model(speed: Speed) -> bool:
        return here(speed) and speed.shape == shape

    def time(name: str, units: float, *matches: Callable[[Speed], bool], noted: str = "") -> StageTime:
        if name in kept.stages:
            return StageTime(name, Estimate(0.0, 0.0, 0.0), _CACHED)
        return StageTime(name, *estimate_stage(of.get(noted or name, []), units, matches=matches))

    num_asked = min(found.num_eval_examples, config.evaluation.max_examples)
    num_asked += sum(probe.max_examples for probe in config.evaluation.probes)

    def of_kind(kind: str) -> tuple[Callable[[Speed], bool], ...]:
        def alike(speed: Speed) -> bool:
            return of_model(speed) and speed.settings == effort

        return lambda each: alike(each) and each.engine == kind, alike, of_model

    evaluation = [time("evaluate base", num_asked, *of_kind("base"), noted="evaluate")] if num_asked else []
    again = [time("evaluate merged", num_asked, *of_kind("merged"), noted="evaluate")] if num_asked else []
    return [
        time("ingest", max(1, found.rows_read), here),
        time("tokenize", found.sizes.total_tokens.value, here),
        *evaluation,
        *training.times,
        time("merge", 1, of_model, here),
        *again,
        time(REST, 1, here),
    ]
