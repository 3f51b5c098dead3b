"""The data and tokenization sections of the configuration: which rows are read, and what of them is learned."""

from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.section import Section

RowFormat = Literal[
    "auto",
    "alpaca",
    "instruct",
    "prompt_completion",
    "messages",
    "sharegpt",
    "question_answer",
    "query_response",
    "input_output",
    "xlam",
    "oasst_tree",
    "moss",
    "preference",
]
PREFERENCE = "preference"
"""The format of rows with a chosen and a rejected answer."""


def _check_amount(weight: float, num_rows: int | None) -> None:
    """Refuse two ways of saying how much of a dataset is trained."""
    if num_rows is not None and weight != 1.0:
        raise ValueError(
            f"weight is {weight:g} and num_rows is {num_rows}: a dataset is taken by one of them: leave the other out"
        )


class DatasetConfig(Section):
    """A further dataset of a mixture."""

    source: str = Field(min_length=1, title="Dataset")
    """As data.source: file, folder, address, name on the hub, or entries of a dataset_info.json."""
    weight: float = Field(default=1.0, gt=0.0, le=1000.0, title="Weight")
    """How often its training rows are taken: 0.5 takes a seeded half of them, 2 takes each twice."""
    num_rows: int | None = Field(default=None, ge=1, title="Training rows")
    """Take exactly this many training rows instead, chosen by the seed, none twice. Empty: by the weight."""
    format: RowFormat = Field(default="auto", title="Format")
    """How rows become conversations; auto goes by the columns."""
    columns: dict[str, str] = Field(default_factory=dict, title="Column map")
    """The format's field name to the data's column name, where the data names it otherwise."""
    ignored_columns: tuple[str, ...] = Field(default=(), title="Ignored columns")
    """Columns that are not read although their names say that they matter, such as label or context."""
    subset: str | None = Field(default=None, title="Hub subset")
    """Configuration name of a hub dataset."""
    split: str = Field(default="train", title="Hub split")
    """Split of a hub dataset."""
    revision: str | None = Field(default=None, title="Hub revision")
    """Commit, tag or branch of a hub dataset."""

    @model_validator(mode="after")
    def _check_weight_or_number(self) -> Self:
        _check_amount(self.weight, self.num_rows)
        return self


class DataConfig(Section):
    """The dataset and its checks."""

    shown_first = ("source", "eval_source", "eval_fraction", "format", "max_rows")

    source: str = Field(min_length=1, title="Dataset")
    """File, folder or address (s3://…) of JSON, JSONL, CSV, Parquet or Arrow, the name of a dataset on the hub,
    or entries of a LLaMA-Factory dataset_info.json as path/dataset_info.json#name1,name2."""
    eval_source: str | None = Field(default=None, title="Held-out dataset")
    """A separate held-out dataset. Empty: a seeded part of the dataset is held out."""
    format: RowFormat = Field(default="auto", title="Format")
    """How rows become conversations; auto goes by the columns."""
    columns: dict[str, str] = Field(default_factory=dict, title="Column map")
    """Where the data names a column otherwise: the format's field name to the data's column name."""
    ignored_columns: tuple[str, ...] = Field(default=(), title="Ignored columns")
    """Columns that are not read although their names say that they matter, such as label or context."""
    trim_trailing_user: bool = Field(default=False, title="Cut unanswered ends")
    """Cut user messages at the end of a conversation, which nothing answers. Off: such rows are rejected."""
    subset: str | None = Field(default=None, title="Hub subset")
    """Configuration name of a hub dataset."""
    split: str = Field(default="train", title="Hub split")
    """Split of a hub dataset."""
    eval_split: str | None = Field(default=None, title="Held-out hub split")
    """Split of a held-out hub dataset, such as test. Empty: the same as the hub split."""
    revision: str | None = Field(default=None, title="Hub revision")
    """Commit, tag or branch of a hub dataset."""
    max_rows: int | None = Field(default=None, ge=1, title="Most rows")
    """Read at most this many rows from the front of the dataset; in a mixture, of each."""
    weight: float = Field(default=1.0, gt=0.0, le=1000.0, title="Weight")
    """How often the dataset's training rows are taken: 0.5 takes a seeded half of them, 2 takes each twice."""
    num_rows: int | None = Field(default=None, ge=1, title="Training rows")
    """Take exactly this many training rows instead, chosen by the seed, none twice. Empty: by the weight."""
    mixture: tuple[DatasetConfig, ...] = Field(default=(), title="Further datasets")
    """Trained together with the dataset. Each is split by itself first; weights and numbers concern training rows."""
    eval_fraction: float = Field(default=0.1, ge=0.0, lt=1.0, title="Held-out part")
    """Part of the rows held out for evaluation when there is no held-out dataset. 0: all rows are trained; without
    held-out rows nothing is compared, and the gate leaves the version challenger."""
    max_eval_rows: int = Field(default=1000, ge=1, title="Most held-out rows")
    """The held-out part never takes more rows than this."""
    max_rejected_fraction: float = Field(default=0.01, ge=0.0, le=1.0, title="Budget for rejected rows")
    """The run fails when a larger part of the rows is rejected."""
    screen: Literal["off", "report", "redact"] = Field(default="report", title="Personal data and secrets")
    """Look for e-mail addresses, phone numbers, keys and passwords; report them, or replace them by [EMAIL] etc."""

    @model_validator(mode="after")
    def _check_settings_that_need_each_other(self) -> Self:
        _check_amount(self.weight, self.num_rows)
        if self.eval_split is not None and self.eval_source is None:
            raise ValueError(
                f"eval_split is {self.eval_split!r}, but there is no eval_source that it could be a split of: "
                "set eval_source too (it may be the same hub dataset), or leave eval_split out"
            )
        return self

    def as_pairs(self) -> "DataConfig":
        """Return the section with every dataset read as pairs of answers."""
        mixture = tuple(part.model_copy(update={"format": PREFERENCE}) for part in self.mixture)
        return self.model_copy(update={"format": PREFERENCE, "mixture": mixture})

    @property
    def holds_out(self) -> bool:
        """Whether rows are held out, so that models can be compared."""
        return self.eval_source is not None or self.eval_fraction > 0

    @property
    def datasets(self) -> tuple[DatasetConfig, ...]:
        """All datasets that are trained, the one of `source` first."""
        first = DatasetConfig(
            source=self.source,
            weight=self.weight,
            num_rows=self.num_rows,
            format=self.format,
            columns=self.columns,
            ignored_columns=self.ignored_columns,
            subset=self.subset,
            split=self.split,
            revision=self.revision,
        )
        return (first, *self.mixture)

    @property
    def held_out_dataset(self) -> DatasetConfig | None:
        """The separate held-out dataset, read in the way of `source`."""
        if self.eval_source is None:
            return None
        return DatasetConfig(
            source=self.eval_source,
            format=self.format,
            columns=self.columns,
            ignored_columns=self.ignored_columns,
            subset=self.subset,
            split=self.eval_split or self.split,
            revision=self.revision,
        )


DroppedPart = Literal[
    "system",
    "user",
    "tool",
    "tools",
    "answer",
    "tool_calls",
    "reasoning",
    "history",
    "history_reasoning",
    "history_tool_calls",
]


class TokenizationConfig(Section):
    """Chat template, label mask and truncation."""

    max_length: int = Field(default=2048, ge=8, title="Longest example (tokens)")
    """Longer conversations are cut inside the prompt's content; header and end of turn stay."""
    truncation: Literal["reject", "cut_answer"] = Field(default="reject", title="Answers that are too long")
    """Reject an example whose answer alone is too long, or cut the answer."""
    max_truncated_fraction: float = Field(default=0.1, ge=0.0, le=1.0, title="Budget for cut examples")
    """The run fails when a larger part of the examples had to be cut or rejected for length."""
    train_on: Literal["all_turns", "last_turn"] = Field(default="all_turns", title="Trained turns")
    """Train every assistant turn, or the last one of each conversation."""
    train_on_prompt: bool = Field(default=False, title="Train on the prompt")
    """Also learn the prompt (continued pretraining on conversations). Usually off."""
    allow_special_tokens: bool = Field(default=False, title="Special tokens in content")
    """Let text that spells a special token become that token. Off: it stays text, and is counted."""
    allow_dropped: tuple[DroppedPart, ...] = Field(
        default=("history_reasoning",), title="What a template may leave out"
    )
    """Rows of which the chat template loses anything else are rejected; what is lost is counted and named."""
    template_arguments: dict[str, bool | int | float | str] = Field(default={}, title="Arguments of the chat template")
    """Values that the chat template reads, such as enable_thinking: false; saved with the model for serving."""
