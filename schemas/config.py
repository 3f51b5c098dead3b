"""The one configuration model: the YAML file, the Prefect run form and the record in MLflow.

Closed (unknown keys are errors) and frozen. Validators reject and never repair. No secret, host or tracking
address belongs here: those are environment.
"""

from typing import Self

from pydantic import Field, model_validator

from schemas.data_config import (
    PREFERENCE,
    DataConfig,
    DatasetConfig,
    RowFormat,
    TokenizationConfig,
)
from schemas.evaluation_config import (
    JUDGED_METRICS,
    PREFERENCE_METRICS,
    EvaluationConfig,
    GateConfig,
    ProbeConfig,
    RegistryConfig,
)
from schemas.section import Section
from schemas.training_config import (
    SETTINGS_OF_PLACE,
    DpoConfig,
    SweepConfig,
    TrainingConfig,
)

__all__ = [
    "JUDGED_METRICS",
    "PREFERENCE",
    "PREFERENCE_METRICS",
    "SETTINGS_OF_PLACE",
    "DataConfig",
    "DatasetConfig",
    "DpoConfig",
    "EvaluationConfig",
    "GateConfig",
    "MergeConfig",
    "ModelConfig",
    "ProbeConfig",
    "RegistryConfig",
    "RowFormat",
    "RunConfig",
    "SweepConfig",
    "TokenizationConfig",
    "TrainingConfig",
]


class ModelConfig(Section):
    """The base model."""

    base_model: str = Field(min_length=1, title="Base model")
    """Folder with safetensors weights, the name of a model on the hub, or a version of the registry, which is trained
    further: models:/NAME/VERSION or models:/NAME@alias."""
    revision: str | None = Field(default=None, title="Revision")
    """Commit, tag or branch on the hub; pin a commit to make runs repeatable. Not used for a folder."""
    chat_template: str | None = Field(default=None, title="Chat template")
    """A .jinja file, or a built-in template's name: chatml, llama3, llama2, mistral, gemma, phi3, phi4, deepseek,
    deepseek3, zephyr, vicuna, alpaca or plain. With default: before the name, it is taken where the tokenizer has no
    template of its own. Empty: default:chatml."""


class MergeConfig(Section):
    """The merge and its proof."""

    max_shard_size: str = Field(default="5GB", pattern=r"^\d+(\.\d+)?(KB|MB|GB)$", title="Shard size")
    """Largest safetensors file, such as 500MB or 5GB."""
    num_probes: int = Field(default=16, ge=1, le=512, title="Probes")
    """Held-out prompts on which merged and base + adapter are compared."""
    probe_tokens: int = Field(default=16, ge=1, le=512, title="Tokens a probe")
    """Greedy tokens generated for each probe."""
    max_logit_diff: float | None = Field(default=None, gt=0, title="Largest logit difference")
    """The run fails above it. Empty: 1e-3 for fp32 weights, 1.0 for 16-bit weights."""
    min_greedy_agreement: float = Field(default=0.95, ge=0.0, le=1.0, title="Smallest greedy agreement")
    """Least part of the greedy tokens that must be the same."""


class RunConfig(Section):
    """One pipeline run, a section a stage in the order of the pipeline."""

    name: str = Field(default="sft", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", title="Name")
    """Names the MLflow experiment."""
    seed: int = Field(default=0, ge=0, lt=2**32, title="Seed")
    """Of the split, the order, the adapter's start and the bootstrap."""
    model: ModelConfig = Field(title="Base model")
    data: DataConfig = Field(title="Dataset")
    tokenization: TokenizationConfig = Field(default=TokenizationConfig(), title="Tokenization")
    training: TrainingConfig = Field(default=TrainingConfig(), title="Training")
    merge: MergeConfig = Field(default=MergeConfig(), title="Merge")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), title="Evaluation")
    registry: RegistryConfig = Field(default=RegistryConfig(), title="Registry")

    @property
    def read_data(self) -> DataConfig:
        """The dataset section as ingestion reads it: as pairs of answers where the objective is for such."""
        return self.data.as_pairs() if self.training.is_paired else self.data

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        formats = [dataset.format for dataset in self.data.datasets]
        judged = [name for name in self.registry.gate.metrics if name in PREFERENCE_METRICS]
        if not self.training.is_paired:
            if PREFERENCE in formats:
                raise ValueError(
                    f"data.format is {PREFERENCE} and training.objective is sft, which trains one answer: set "
                    "training.objective to dpo, or data.columns to the answer that is trained"
                )
            if judged:
                raise ValueError(
                    f"registry.gate judges by {', '.join(judged)}, which pairs of answers have, and training.objective "
                    "is sft: set it to dpo, or name another metric"
                )
            return self
        if other := [name for name in formats if name not in ("auto", PREFERENCE)]:
            raise ValueError(
                f"training.objective is dpo and data.format is {other[0]}, which has one answer: set data.format to "
                f"{PREFERENCE} or auto"
            )
        if self.data.holds_out and not judged:
            raise ValueError(
                f"training.objective is dpo and registry.gate judges by {', '.join(self.registry.gate.metrics)}, which "
                "pairs of answers do not optimize: set registry.gate.metric to preference_loss or reward_accuracy"
            )
        if self.tokenization.train_on_prompt:
            raise ValueError(
                "training.objective is dpo and tokenization.train_on_prompt is true: both answers have the same "
                "prompt, which cancels out: leave train_on_prompt out"
            )
        return self

    @model_validator(mode="after")
    def _check_held_out_rows_are_there_for_what_wants_them(self) -> Self:
        if self.data.holds_out:
            return self
        wants = {
            "training.early_stopping_patience": self.training.early_stopping_patience,
            "training.keep": "best" if self.training.keep == "best" else None,
            "training.sweep": f"of {self.training.sweep.num_candidates}" if self.training.sweep.is_on else None,
        }
        for name, value in wants.items():
            if value is not None:
                raise ValueError(
                    f"{name} is {value}, which goes by held-out rows, and data.eval_fraction is 0: hold out a part, or "
                    f"leave {name} out"
                )
        return self

    @model_validator(mode="after")
    def _check_pack_holds_an_example(self) -> Self:
        tokens_per_pack = self.training.tokens_per_pack
        if self.training.packing and tokens_per_pack != "auto" and tokens_per_pack < self.tokenization.max_length:
            raise ValueError(
                f"training.tokens_per_pack is {tokens_per_pack}, but examples may have "
                f"tokenization.max_length = {self.tokenization.max_length} tokens: raise the one or lower the other"
            )
        return self
