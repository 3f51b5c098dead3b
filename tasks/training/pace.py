"""How fast a training went on this machine, noted for the plans of later ones."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl
import psutil

from schemas.config import TrainingConfig
from tasks import speeds
from tasks.training.process.messages import TrainingJob
from tasks.training.records import EvalRecord, StepRecord, TrainingOutcome

STEPS = "train: steps"
"""The steps after the first, by what went through the model."""
FIRST_STEP = "train: first step"
"""What the first step took beyond a usual one: compiled kernels, filled caches."""
HELD_OUT = "train: held-out losses"
"""By the held-out tokens that were looked at."""
CHECKPOINTS = "train: checkpoints"
"""For which the training waited, by trained values."""
AROUND = "train: around the steps"
"""Before the first step, such as loading and trying out, and after the last."""
# What of the training section changes how long a token takes, or what memory it wants.
_DECISIVE = (
    *(
        "method",
        "trained_layers",
        "trained_modules",
        "rank",
        "dropout",
        "target_modules",
        "modules_to_save",
        "use_dora",
    ),
    *("optimizer", "micro_batch", "gradient_accumulation_steps", "packing", "tokens_per_pack", "engine", "precision"),
    *("base_weights", "gradient_checkpointing", "num_processes", "num_nodes", "strategy"),
)
_FURTHER = ("objective", "sweep", "base_dropout", "context_parallel")
"""Noted where they are not as usual: lines of earlier releases have none of them."""


def describe_conditions(config: TrainingConfig) -> str:
    """Return the settings that decide a training's pace."""
    further = {name for name in _FURTHER if getattr(config, name) != TrainingConfig.model_fields[name].default}
    return speeds.write_settings(config.model_dump(mode="json", include=set(_DECISIVE) | further))


def describe_model(folder: Path) -> dict[str, float]:
    """Return the sizes of a model by which the costs of a training go; nothing without its config.json."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    text = {**values, **(values.get("text_config") or {})}
    layers, hidden = text.get("num_hidden_layers", text.get("n_layer")), text.get("hidden_size", text.get("n_embd"))
    if not layers or not hidden:
        return {}
    experts = text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts") or 0
    width = text.get("moe_intermediate_size") or text.get("intermediate_size") or 4 * hidden
    active = (text.get("num_experts_per_tok") or 0) if experts else 0
    return {
        "layers": float(layers),
        "hidden": float(hidden),
        "vocabulary": float(text.get("vocab_size") or 0),
        "width": float(width) * max(1, active),
    }


def measure_products(
    model: Mapping[str, float], config: TrainingConfig, flop_per_token: float, num_trained: int
) -> dict[str, float]:
    """Return the model's sizes with the useful work of a token of its body, a row of its head, and the adapter.

    Args:
        model: from `describe_model`.
        config: the training section.
        flop_per_token: of the linear layers, the head's among them; see `throughput`.
        num_trained: trained values.
    """
    head = 4.0 * model["vocabulary"] * model["hidden"]
    head = head if config.is_lora or head < flop_per_token else 0.0
    body = max(0.0, flop_per_token - head)
    adapter = 6.0 * num_trained if config.is_lora else 0.0
    return {**model, "trained": float(num_trained), "flop": body, "head_flop": head, "adapter_flop": adapter}


class PaceClock:
    """Counts what the parts of a training in this process took; steps before a resume are not among them.

    What passes between two records and is neither a step nor a held-out loss is a checkpoint's, where one was due, and
    the steps' own else: the clock on the wall goes on there too.
    """

    def __init__(
        self,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        on_eval: Callable[[EvalRecord], None] = lambda record: None,
        *,
        num_warming: int = 1,
        saves_every: int = 0,
        is_trial: bool = False,
    ) -> None:
        """Begin.

        Args:
            on_step: gets every step.
            on_eval: gets every held-out loss.
            num_warming: first steps that are not counted, as they compile kernels and fill caches.
            saves_every: steps between two checkpoints; 0 for none.
            is_trial: whether no run is under way: this process holds less than a run's.
        """
        self._on_step, self._on_eval = on_step, on_eval
        self._timing, self._num_warming, self._saves_every = speeds.Timing(), num_warming, saves_every
        self._work: dict[str, int] = {}
        self._num_tokens, self._num_counted, self._num_seen, self._last_step = 0, 0, 0, 0
        self._num_evals, self._num_saves = 0, 0
        self._first = self._seconds = self._eval_seconds = self._save_seconds = 0.0
        self._begin = self._end = 0.0
        self._is_trial, self._resident_bytes = is_trial, psutil.Process().memory_info().rss

    def count(self, record: StepRecord) -> None:
        """Take note of a step, and pass it on."""
        now, seconds = self._timing.seconds, record.num_tokens / record.tokens_per_second
        between = now - self._end - seconds
        self._num_seen += 1
        if self._num_seen == 1:
            self._first, self._begin = seconds, max(0.0, now - seconds)
        elif self._saves_every and self._last_step % self._saves_every == 0:
            self._num_saves += 1
            self._save_seconds += between
        elif self._num_seen > self._num_warming:
            self._seconds += between
        if self._num_seen > self._num_warming:
            self._add(record, seconds)
        self._end, self._last_step = now, record.step
        self._on_step(record)

    def judge(self, record: EvalRecord) -> None:
        """Take note of a held-out loss, and pass it on."""
        now = self._timing.seconds
        self._num_evals += 1
        self._eval_seconds += now - self._end
        self._end = now
        self._on_eval(record)

    def _add(self, record: StepRecord, seconds: float) -> None:
        self._num_counted += 1
        self._num_tokens += record.num_tokens
        self._seconds += seconds
        for name, number in record.work.items():
            known = self._work.get(name, 0)
            self._work[name] = max(known, number) if name == "largest_pass" else known + number

    def note(self, outcome: TrainingOutcome, job: TrainingJob, *, num_held_out: int = 0) -> None:
        """Write down what was measured, where a step was done.

        Args:
            outcome: of the training.
            job: that was done.
            num_held_out: tokens of the held-out examples.
        """
        if not self._num_tokens:
            return
        lived, per_step = self._timing.seconds, max(self._seconds, 1e-6) / self._num_counted
        shape, settings = speeds.describe_shape(job.base_model), describe_conditions(job.config)
        common = (outcome.device, shape, settings, outcome.engine.partition(",")[0])

        def note(stage: str, units: float, seconds: float) -> None:
            speeds.note(speeds.Speed(stage, units, max(seconds, 1e-3), *common))

        speeds.note(
            speeds.Speed(
                STEPS,
                self._num_tokens,
                max(self._seconds, 1e-6),
                *common,
                outcome.flop_per_token,
                outcome.peak_memory_bytes,
                self._describe_work(outcome, job, num_held_out),
            )
        )
        note(FIRST_STEP, 1, self._first - per_step)
        if self._num_evals and num_held_out:
            note(HELD_OUT, self._num_evals * num_held_out, self._eval_seconds)
        if self._num_saves:
            note(CHECKPOINTS, self._num_saves * outcome.num_trainable_parameters, self._save_seconds)
        note(AROUND, 1, self._begin + lived - self._end)

    def _describe_work(self, outcome: TrainingOutcome, job: TrainingJob, num_held_out: int) -> dict[str, float]:
        """Return what the counted steps were, and the sizes of the model; nothing where the steps do not say."""
        model = describe_model(job.base_model)
        if not self._work or not model:
            return {}
        return {
            **{name: float(number) for name, number in self._work.items()},
            "steps": float(self._num_counted),
            "ranks": float(job.config.num_ranks),
            "sharing": float(job.config.context_parallel),
            "recomputed": outcome.recomputed_part,
            "flat": float(outcome.is_flat),
            "room": float(outcome.room_tokens),
            "piece": float(outcome.piece_tokens),
            "in_host": float(outcome.num_in_host),
            "held_out_pass": float(min(num_held_out, outcome.room_tokens)),
            "resident": float(self._resident_bytes),
            "trial": float(self._is_trial),
            **measure_products(model, job.config, outcome.flop_per_token, outcome.num_trainable_parameters),
        }


def count_tokens(split: Path) -> int:
    """Return the tokens of a split, a file or a folder of parts, of both answers of pairs; 0 where there is none."""
    if not split.exists():
        return 0
    table = pl.scan_parquet(split)
    names = [name for name in ("input_ids", "rejected_ids") if name in table.collect_schema()]
    counted = table.select(pl.sum_horizontal(pl.col(name).list.len().sum() for name in names)).collect()
    return int(counted.item() or 0)
