"""The evaluation and registry sections of the configuration: what is measured, and what the gate asks for."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.data_config import RowFormat
from schemas.section import Section

PREFERENCE_METRICS = ("preference_loss", "reward_accuracy", "reward_margin")
"""Of pairs of answers; they compare a model with the base model that the run began with."""
JUDGED_METRICS = (
    "exact_match",
    "rouge_l",
    "chrf",
    "nll",
    "perplexity",
    "repetition_rate",
    "empty_answers",
    *PREFERENCE_METRICS,
)
"""Metrics that forms offer to judge by; the table of metrics decides which there are."""
_JudgedMetric = Annotated[str, Field(json_schema_extra={"enum": [*JUDGED_METRICS]})]


class ProbeConfig(Section):
    """A further held-out set: what the base model does well, and the new model must still do."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", title="Name")
    """In reports and metrics."""
    source: str = Field(min_length=1, title="Dataset")
    """As data.source. All its rows are asked, none is trained."""
    metric: _JudgedMetric = Field(default="nll", min_length=1, title="Metric")
    """By which it is judged; as registry.gate.metric."""
    max_loss: float = Field(ge=0.0, title="Largest loss")
    """In the metric's unit. The gate refuses a version that may have lost more, by the worse end of the interval."""
    as_text: bool = Field(default=False, title="Running text")
    """Prompt and answer as they stand, one behind the other, without a chat template: what base models are good at."""
    max_examples: int = Field(default=200, ge=2, title="Most rows")
    """Rows asked, chosen by their digest: the same ones each time."""
    format: RowFormat = Field(default="auto", title="Format")
    """As data.format."""
    columns: dict[str, str] = Field(default_factory=dict, title="Column map")
    """As data.columns."""
    ignored_columns: tuple[str, ...] = Field(default=(), title="Ignored columns")
    """As data.ignored_columns."""
    subset: str | None = Field(default=None, title="Hub subset")
    """Configuration name of a hub dataset."""
    split: str = Field(default="train", title="Hub split")
    """Split of a hub dataset."""
    revision: str | None = Field(default=None, title="Hub revision")
    """Commit, tag or branch of a hub dataset."""


class EvaluationConfig(Section):
    """Base and merged model on the same held-out rows."""

    max_examples: int = Field(default=200, ge=1, title="Most held-out rows")
    """Rows evaluated, from the front of the held-out part."""
    batch_size: Literal["auto"] | int = Field(default="auto", title="Batch")
    """Prompts generated at once. auto: as many as the free memory of a GPU holds, up to 256; 16 on a CPU."""
    num_processes: int = Field(default=1, ge=1, le=1024, title="Processes")
    """On this machine, one a GPU; each loads the model and answers its share of the rows."""
    max_new_tokens: int = Field(default=128, ge=1, le=32768, title="Longest answer (tokens)")
    """Greedy decoding stops here at the latest."""
    questions: tuple[str, ...] = Field(default=(), title="Free questions")
    """Asked of both models and shown side by side, without a score."""
    system_message: str = Field(default="", title="System message of the questions")
    """Said before each free question. Held-out rows have their own."""
    num_resamples: int = Field(default=2000, ge=100, le=100_000, title="Bootstrap resamples")
    """For the paired confidence intervals."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, title="Confidence")
    """Level of the intervals."""
    probes: tuple[ProbeConfig, ...] = Field(default=(), title="Probes")
    """Further held-out sets that show what the new model forgot."""

    @model_validator(mode="after")
    def _check_probes_have_names_of_their_own(self) -> Self:
        names = [probe.name for probe in self.probes]
        if len(set(names)) < len(names):
            raise ValueError(f"probes are named {', '.join(names)}: give each a name of its own")
        return self

    @model_validator(mode="after")
    def _check_batch_holds_a_prompt(self) -> Self:
        if self.batch_size != "auto" and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: set auto, or at least 1")
        return self


class GateConfig(Section):
    """What a version must show to become champion."""

    metric: _JudgedMetric = Field(default="nll", min_length=1, title="Metric")
    """Judged on the held-out rows, as in the report's table; a gain is an improvement, also where lower is better."""
    further_metrics: tuple[_JudgedMetric, ...] = Field(default=(), title="Further metrics")
    """A gain in one of these is as good. All of them are then tested more strictly, as there are several (Holm)."""
    min_gain: float = Field(default=0.0, ge=0.0, title="Smallest gain")
    """The gain must be larger than this, in the metric's unit."""
    require_significance: bool = Field(default=True, title="Interval must exclude zero")
    """Refuse when the confidence interval of the gain includes zero, or chance could explain the gain."""
    min_conversations: int = Field(default=30, ge=1, title="Fewest held-out conversations")
    """With fewer, no version becomes champion: they cannot show that it is better."""
    guards: dict[str, float | None] = Field(default_factory=dict, title="Guards")
    """Metric to the largest loss that is tolerated: even the worse end of the interval may not lose more. Without a
    setting: repetition_rate 0.1, empty_answers 0.1, chrf 5. null takes one away."""
    min_gain_over_champion: float = Field(default=0.0, title="Smallest gain over the champion")
    """The same against the present champion, on rows that neither was trained on: the gain must be larger, and its
    interval must lie above the smaller of zero and this. Negative: a loss up to this is tolerated."""

    @model_validator(mode="after")
    def _check_margins(self) -> Self:
        for name, margin in self.guards.items():
            if margin is not None and not margin >= 0:
                raise ValueError(
                    f"guards.{name} is {margin}: it is the largest loss that is tolerated: 0 or more, or null for none"
                )
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of which one has to gain, none twice."""
        return tuple(dict.fromkeys((self.metric, *self.further_metrics)))


class RegistryConfig(Section):
    """The registered model and its gate."""

    name: str = Field(default="sft-model", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", title="Registered model")
    """Name in the MLflow registry."""
    gate: GateConfig = Field(default=GateConfig(), title="Gate")
    """What a version must show to become champion."""
