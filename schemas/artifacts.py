"""References between stages, and the report of a run: small, frozen, JSON.

A reference names a folder by address and digest; frames, tensors and models never cross a task's border.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from schemas.config import RunConfig


class Ref(BaseModel):
    """A folder of files: where it is kept, what it holds, and the MLflow run that made it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    """MLflow address of the folder (runs:/…, models:/…), or a file path for what the user brought."""
    digest: str
    """sha256 over the folder's file names and contents; see tasks.storage.digest_folder."""
    mlflow_run_id: str | None = None
    """Run that made it; none for what the user brought."""


class SourceRef(Ref):
    """The user's dataset files, before anything is read."""

    eval_uri: str | None = None
    """Held-out files, when they are separate."""


class ModelRef(Ref):
    """A complete causal language model in a folder: config, safetensors, tokenizer."""

    name: str
    """What the user calls it: hub name or folder name."""
    revision: str | None = None
    """Commit on the hub."""
    kind: Literal["base", "merged", "champion"] = "base"


class DatasetRef(Ref):
    """Validated conversations: train.parquet, eval.parquet, rejects.parquet, quality.json."""

    source_digest: str
    """Digest of the files as the user gave them."""
    rows_in: int
    rows_train: int
    rows_eval: int
    rows_rejected: dict[str, int]
    """Rejected rows by reason."""
    rows_duplicate: int
    rows_leaked: int
    rows_read: int = 0
    """Rows of the files: without the copies that a weight makes, with the rows that one leaves out."""
    warnings: tuple[str, ...] = ()
    """What a person should know of the rows, a sentence each; see quality.json."""


class TokensRef(Ref):
    """Examples with labels: train.parquet, eval.parquet, tokenizer/ (as it will ship), masks.json."""

    rows_train: int
    """Training conversations that became examples."""
    rows_eval: int
    """Held-out conversations that became examples."""
    num_examples: int
    """Training examples; more than rows_train where a conversation had to become several."""
    num_eval_examples: int
    trained_tokens: int
    """Tokens with a label, in the training part."""
    total_tokens: int
    """All tokens of the training part."""
    rows_rejected: dict[str, int]
    """Conversations that could not become examples, by reason."""
    template_digest: str
    """sha256 of the chat template that ships."""
    warnings: tuple[str, ...] = ()
    """What a person should know of how the examples were made, a sentence each."""


class AdaptedWeights(BaseModel):
    """The weight matrices of one kind, and how many of them an adapter stands beside."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    """attention, dense layers, routed experts, …"""
    num_weights: int
    """A stack of all experts' projections counts as one."""
    num_adapted: int
    num_values: int
    """Of the base's weights."""
    num_adapted_values: int
    skipped: tuple[str, ...] = ()
    """Which are not adapted and why, a sentence for each reason."""


class CandidateReport(BaseModel):
    """One training of a sweep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    learning_rate: float
    rank: int
    seed: int
    loss: float | None
    """Held-out; none where it was given up."""
    failure: str = ""
    """Why it was."""


class SweepReport(BaseModel):
    """Several trainings of which the best one was taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    winner: str
    loss: float
    """Held-out, as measured."""
    corrected_loss: float | None
    """With what the choice has made it too small, estimated; none where the candidates were trained one by one."""
    candidates: tuple[CandidateReport, ...]

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        corrected = "" if self.corrected_loss is None else f", {self.corrected_loss:.4f} corrected for the choice"
        return (
            f"{self.winner} has the smallest held-out loss of {len(self.candidates)} candidates: {self.loss:.4f}"
            f"{corrected}"
        )


class AdapterRef(Ref):
    """What was trained: a PEFT adapter, or weights of the model itself.

    The files are adapter_config.json and adapter_model.safetensors, or trained_config.json and
    trained_weights.safetensors.
    """

    method: Literal["lora", "full", "freeze"] = "lora"
    """How it was trained; lora leaves an adapter."""
    num_steps: int
    num_packs: int
    """Rows of one epoch: packs, or the number of examples when not packing."""
    packing_efficiency: float
    """Tokens of one epoch / (num_packs * tokens_per_pack); without packing, / (rows * padded length)."""
    final_loss: float
    """Mean training loss a token over the last tenth of the steps (nats)."""
    best_eval_loss: float | None
    """Smallest evaluation loss seen (nats a token)."""
    tokens_per_second: float
    """Non-padding tokens trained on a second, without evaluation and checkpoints."""
    peak_memory_bytes: int
    """GPU allocation on a GPU, resident memory of the process on a CPU."""
    adapted: tuple[AdaptedWeights, ...] = ()
    """Which of the base's weights it stands beside, or are trained themselves, by kind."""
    warnings: tuple[str, ...] = ()
    """What a person should know, such as over-fitting."""
    sweep: SweepReport | None = None
    """Of several candidates, of which it is the winner."""


class MergeCheck(BaseModel):
    """Merged model, reloaded from disk, against base + adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_abs_logit_diff: float
    greedy_agreement: float
    """Part of the greedy tokens that are the same, 0 to 1."""
    differs_from_base: bool
    """False means that training or merging did nothing."""
    num_changed: int = 0
    """Tensors of the files that differ from the base's: all of them weights that the adapter stands beside."""
    num_kept: int = 0
    """Tensors of the files that are the base's byte for byte."""


class MergedRef(ModelRef):
    """The merged model and its proof."""

    kind: Literal["base", "merged", "champion"] = "merged"
    check: MergeCheck
    answers: Ref | None = None
    """What it and its base answer to probes: probes.json (schemas.proofs.ServingProbes)."""


class ProbesRef(Ref):
    """Examples of the further held-out sets: NAME.parquet, as eval.parquet of the tokens."""

    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    """What was left out, a sentence each."""


class EvalReport(Ref):
    """One model on the held-out rows: rows.parquet (schemas.records.EvaluationRows) and its means."""

    model_digest: str
    conditions: str
    """Digest of all that decides the figures besides the model: rows, settings, code, libraries, device."""
    num_examples: int
    metrics: dict[str, float]
    """Metric name to its mean over the rows (perplexity: exp of the mean nll a token)."""
    probes: dict[str, dict[str, float]] = {}
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
