"""How fast a training went on this machine, noted for the plans of later ones."""

from collections.abc import Callable

from schemas.config import TrainingConfig
from tasks import speeds
from tasks.training.process.messages import TrainingJob
from tasks.training.records import StepRecord, TrainingOutcome

STEPS, AROUND = "train: steps", "train: around the steps"
"""Stages under which a training is noted: its pace, and loading, trying out, evaluation losses and checkpoints."""
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


def describe_conditions(config: TrainingConfig) -> str:
    """Return the settings that decide a training's pace."""
    return speeds.write_settings(config.model_dump(mode="json", include=set(_DECISIVE)))


class PaceClock:
    """Counts what the steps of this process took; those before a resume are not among them."""

    def __init__(self, on_step: Callable[[StepRecord], None] = lambda record: None, *, num_warming: int = 0) -> None:
        """Begin.

        Args:
            on_step: gets every step.
            num_warming: first steps that are not counted, as they compile kernels and fill caches.
        """
        self._on_step, self._timing, self._num_warming = on_step, speeds.Timing(), num_warming
        self._num_tokens, self._seconds = 0, 0.0

    def count(self, record: StepRecord) -> None:
        """Take note of a step, and pass it on."""
        if record.step > self._num_warming:
            self._num_tokens += record.num_tokens
            self._seconds += record.num_tokens / record.tokens_per_second
        self._on_step(record)

    def note(self, outcome: TrainingOutcome, job: TrainingJob) -> None:
        """Write down what was measured, where a step was done."""
        if not self._num_tokens:
            return
        shape, settings = speeds.describe_shape(job.base_model), describe_conditions(job.config)
        engine = outcome.engine.partition(",")[0]
        speeds.note(
            speeds.Speed(
                STEPS,
                self._num_tokens,
                self._seconds,
                outcome.device,
                shape,
                settings,
                engine,
                outcome.flop_per_token,
                outcome.peak_memory_bytes,
            )
        )
        around = max(self._timing.seconds - self._seconds, 1e-3)
        speeds.note(speeds.Speed(AROUND, 1, around, outcome.device, shape, settings, engine))
