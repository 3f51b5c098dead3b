"""References between stages, and the report of a run: small, frozen, JSON.

A reference names a folder by address and digest; frames, tensors and models never cross a task's border.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from schemas.config import RunConfig
from schemas.judgements import (
    Champion,
    ChampionReport,
    ComparisonReport,
    Decision,
    Delta,
    EvalReport,
    GateCheck,
    ProbeReport,
)
from schemas.references import (
    AdaptedWeights,
    AdapterRef,
    CandidateReport,
    DatasetRef,
    MergeCheck,
    MergedRef,
    ModelRef,
    ProbesRef,
    Ref,
    SourceRef,
    SweepReport,
    TokensRef,
)

__all__ = [
    "AdaptedWeights",
    "AdapterRef",
    "CandidateReport",
    "Champion",
    "ChampionReport",
    "ComparisonReport",
    "DatasetRecipe",
    "DatasetRef",
    "DatasetReport",
    "Decision",
    "Delta",
    "EvalReport",
    "EvaluationReport",
    "GateCheck",
    "MergeCheck",
    "MergedRef",
    "ModelRef",
    "Move",
    "ProbeReport",
    "ProbesRef",
    "Published",
    "Ref",
    "RegistryEntry",
    "RunReport",
    "SourceRef",
    "SweepReport",
    "TokensRef",
    "TokensReport",
    "TrainingReport",
]


class RegistryEntry(BaseModel):
    """The registered version and what the gate said."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str
    aliases: tuple[str, ...]
    verdict: Literal["promoted", "refused"]
    reasons: tuple[str, ...]
    previous: str | None = None
    """Version that was champion before, when this one was promoted."""


class Move(BaseModel):
    """One move of the alias champion, as the audit trail keeps it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    """Counts from 1 within a registered model."""
    action: Literal["promote", "rollback", "found"]
    """found: the champion was another than the trail said, so somebody moved it by other means."""
    name: str
    version_from: str | None
    version_to: str | None
    who: str
    when: str
    """ISO 8601, UTC."""
    why: str
    forced: bool = False
    evidence: dict[str, str]
    """MLflow run, gate's verdict and reasons, digests; copied, so that they outlive the run."""


class Published(Ref):
    """A version of a dataset in MLflow: the files as they were given."""

    name: str
    version: str
    address: str
    """datasets:/NAME/VERSION, to be used as data.source."""
    is_new: bool
    """False when this content had been published before."""


class DatasetRecipe(BaseModel):
    """What a published dataset is trained with: a config under the dataset's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Of the dataset."""
    number: int
    """Counts from 1 within a dataset."""
    run_id: str
    """MLflow run that holds it."""
    config: RunConfig


class DatasetReport(BaseModel):
    """Accounting: rows_in = rows_train + rows_eval + sum(rows_rejected) + rows_duplicate + rows_leaked."""

    digest: str
    rows_in: int
    rows_train: int
    rows_eval: int
    rows_rejected: dict[str, int]
    rows_duplicate: int
    rows_leaked: int
    warnings: tuple[str, ...] = ()
    """Of ingestion and tokenization."""


class TokensReport(BaseModel):
    """What the training part weighs."""

    examples: int
    trained_tokens: int
    total_tokens: int
    packs: int
    packing_efficiency: float


class TrainingReport(BaseModel):
    """How the training went."""

    steps: int
    final_loss: float
    tokens_per_second: float
    peak_memory_bytes: int
    adapted: tuple[AdaptedWeights, ...] = ()
    """Which of the base's weights the adapter stands beside, by kind."""
    warnings: tuple[str, ...] = ()
    sweep: SweepReport | None = None


class EvaluationReport(BaseModel):
    """Before and after, on the same rows."""

    num_examples: int
    num_conversations: int
    sentence: str
    """What was found, in words."""
    before: dict[str, float]
    after: dict[str, float]
    delta: dict[str, Delta]
    champion: ChampionReport | None = None
    probes: tuple[ProbeReport, ...] = ()
    checks: tuple[GateCheck, ...] = ()
    """What the gate looked at."""
    warnings: tuple[str, ...] = ()
    """What a reader of the figures should know."""


class RunReport(BaseModel):
    """The whole run as JSON, for `sft run --report`."""

    status: Literal["completed", "failed"]
    mlflow_run_id: str
    prefect_flow_run_id: str
    dataset: DatasetReport
    tokens: TokensReport
    training: TrainingReport
    merge: MergeCheck
    evaluation: EvaluationReport
    registry: RegistryEntry
    durations_seconds: dict[str, float]
