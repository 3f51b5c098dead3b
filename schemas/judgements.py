"""What an evaluation found, what changed, and what the gate says of it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.references import ModelRef, Ref


class EvalReport(Ref):
    """One model on the held-out rows: rows.parquet (schemas.records.EvaluationRows) and its means."""

    model_digest: str
    conditions: str
    """Digest of all that decides the figures besides the model: rows, settings, code, libraries, device."""
    num_examples: int
    metrics: dict[str, float]
    """Metric name to its mean over the rows (perplexity: exp of the mean nll a token)."""
    probes: dict[str, dict[str, float]] = Field(default={})
    """The same of each further held-out set."""


class Delta(BaseModel):
    """after minus before, with a paired bootstrap interval and a paired randomization test."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    ci_low: float
    ci_high: float
    p_value: float | None = None
    """Two-sided, corrected for the number of metrics; None where nothing was tested."""
    confidence: float = 0.95
    """Level of the interval."""

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the interval excludes zero and the test, corrected for several metrics, says the same."""
        excluded = not self.ci_low <= 0.0 <= self.ci_high
        return excluded and (self.p_value is None or self.p_value <= 1 - self.confidence)

    @property
    def change(self) -> str:
        """The value with its sign, in four digits."""
        return _write_signed(self.value)

    @property
    def interval(self) -> str:
        """The interval in words."""
        return f"{_write_signed(self.ci_low)} to {_write_signed(self.ci_high)}"


def _write_signed(value: float) -> str:
    """Write a difference with its sign; nothing has none."""
    return f"{value:+.4g}" if value else "0"


class Champion(BaseModel):
    """The version in force when a run looked: what the new one has to beat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Registered model."""
    version: str
    model: ModelRef | None
    """None when it was not registered by a pipeline run, so that nothing is known of its folder."""
    evaluation: EvalReport | None
    """What its own run measured."""
    dataset: Ref | None
    """Conversations of its own run: those it was trained on are no test for it."""
    obstacle: str | None
    """Why it cannot answer the rows of this run, in words; None when it can."""


class ChampionReport(BaseModel):
    """New version against the champion, on the held-out rows that neither was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    num_examples: int
    """Rows compared; 0 when the two could not be compared."""
    num_conversations: int = 0
    """Source conversations of these rows."""
    num_seen: int
    """Held-out rows left out because the champion was trained on them."""
    metrics: dict[str, float]
    """Of the champion, on these rows."""
    delta: dict[str, Delta]
    """New version minus champion."""
    notes: tuple[str, ...]
    """How it was compared, or why not."""


class ProbeReport(BaseModel):
    """Base and new model on a further held-out set, which shows what was forgotten."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    metric: str
    max_loss: float
    """That the gate tolerates."""
    num_conversations: int
    before: float
    after: float
    delta: Delta


class GateCheck(BaseModel):
    """One thing that the gate looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["conversations", "gain", "guard", "champion", "probe"]
    passed: bool
    finding: str
    """What was found; where it did not pass, also the limit and what to do."""


class Decision(BaseModel):
    """What the gate decided, and by what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Literal["promoted", "refused"]
    checks: tuple[GateCheck, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """What speaks against the version; or, of a promoted one, what it gained."""
        if self.verdict == "refused":
            return tuple(check.finding for check in self.checks if not check.passed)
        return tuple(check.finding for check in self.checks if check.kind == "gain" and check.passed)


class ComparisonReport(Ref):
    """The models side by side: table.parquet, plots, report.html."""

    num_examples: int
    num_conversations: int = 0
    """Source conversations of these rows."""
    sentence: str
    """What was found, in words; the same in terminal, report and MLflow."""
    decision: Decision
    warnings: tuple[str, ...] = ()
    """What a reader of the figures should know, a sentence each."""
    before: dict[str, float]
    after: dict[str, float]
    delta: dict[str, Delta]
    champion: ChampionReport | None = None
    """None when there was no champion of this name."""
    probes: tuple[ProbeReport, ...] = ()
