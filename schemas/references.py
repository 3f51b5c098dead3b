"""What stages hand on: small references to what they left, with its digest and counts."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


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
