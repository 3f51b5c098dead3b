"""The one configuration model: the YAML file, the Prefect run form and the record in MLflow.

Closed (unknown keys are errors) and frozen. Validators reject and never repair. No secret, host or tracking
address belongs here: those are environment.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


def _number_fields(schema: dict[str, Any]) -> None:
    """Give every property its place, so that the Prefect form keeps the order of definition."""
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


class Section(BaseModel):
    """Base of all sections: closed, frozen, attribute docstrings become the form's help texts."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra=_number_fields,
        allow_inf_nan=False,
    )


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


class DpoConfig(Section):
    """Direct preference optimization (Rafailov et al., 2023), where the objective is dpo."""

    beta: float = Field(default=0.1, gt=0.0, le=100.0, title="Beta")
    """How strongly the model is held to the one that it began as: larger is nearer. For ipo it is the paper's tau."""
    loss: Literal["sigmoid", "hinge", "ipo"] = Field(default="sigmoid", title="Loss")
    """Of a pair: sigmoid as in the paper; hinge (SLiC); ipo, which goes by the mean log-probability of a token."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5, title="Label smoothing")
    """Part of the pairs that are taken to be the wrong way round (conservative DPO); with loss sigmoid."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing is {self.label_smoothing:g} and loss is {self.loss}: only sigmoid is smoothed: set "
                "label_smoothing 0, or loss sigmoid"
            )
        return self


class SweepConfig(Section):
    """Several trainings in one: every learning rate with every rank and every seed, and the best of them is taken."""

    learning_rates: tuple[Annotated[float, Field(gt=0, le=1.0)], ...] = Field(default=(), title="Learning rates")
    """Tried in place of training.learning_rate. Empty: that one."""
    ranks: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(default=(), title="Ranks")
    """Tried in place of training.rank; alpha moves along, so that the scale stays. Empty: that one."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(default=(), title="Seeds")
    """Of order and adapter's start. Empty: the run's own."""

    @property
    def num_candidates(self) -> int:
        """How many trainings there are."""
        return max(1, len(self.learning_rates)) * max(1, len(self.ranks)) * max(1, len(self.seeds))

    @property
    def is_on(self) -> bool:
        """Whether there is anything to try."""
        return bool(self.learning_rates or self.ranks or self.seeds)

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        for name in ("learning_rates", "ranks", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} are {', '.join(map(str, values))}: name each once")
        if self.num_candidates > 64:
            raise ValueError(f"there are {self.num_candidates} candidates: at most 64 are trained side by side")
        return self


class TrainingConfig(Section):
    """What is trained, and how."""

    objective: Literal["sft", "dpo"] = Field(default="sft", title="Objective")
    """sft: the answers are learned; dpo: of two answers to a prompt (rows with chosen and rejected) the chosen one is
    preferred more than the base model does, which is usually a model after sft."""
    dpo: DpoConfig = Field(default=DpoConfig(), title="Preferences (dpo)")
    sweep: SweepConfig = Field(default=SweepConfig(), title="Sweep")
    method: Literal["lora", "full", "freeze"] = Field(default="lora", title="Method")
    """lora: small matrices beside frozen layers; full: every weight of the text decoder; freeze: its last layers, or
    named modules, and nothing else. Full training usually wants a learning rate a tenth of LoRA's."""
    trained_layers: int = Field(default=2, ge=0, le=1024, title="Trained layers (freeze)")
    """With method freeze: so many of the last layers are trained."""
    trained_modules: tuple[str, ...] = Field(default=(), title="Trained modules (freeze)")
    """With method freeze: modules trained besides, by the end of their dotted names, such as lm_head or layers.0.mlp.
    With trained_layers 0 they alone are trained."""
    rank: int = Field(default=64, ge=1, le=1024, title="LoRA rank")
    """Rank r of the adapter matrices."""
    alpha: float = Field(default=128.0, gt=0, title="LoRA alpha")
    """Scale numerator: the merged weight is W + (alpha / r) B A."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, title="LoRA dropout")
    """Dropout on the adapter's input."""
    base_dropout: bool = Field(default=False, title="The base's own dropout")
    """Keep the dropout that the base model's own config asks for, if any. Off, the base computes as it does when it
    answers."""
    target_modules: tuple[str, ...] = Field(default=("all-linear",), min_length=1, title="Target modules")
    """Names of the linear layers to adapt; all-linear means all of the text decoder, experts included, but routers and
    the output head."""
    modules_to_save: tuple[str, ...] = Field(default=(), title="Fully trained modules")
    """Modules trained in full beside the adapter, such as embed_tokens."""
    use_rslora: bool = Field(default=False, title="Rank-stabilized LoRA")
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool = Field(default=False, title="DoRA")
    """Weight-decomposed LoRA: slower, sometimes better at low rank."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0, title="Routers' auxiliary loss")
    """Weight of the loss that keeps a mixture's experts evenly used. Empty: as the model's config.json says. It does
    not go with objective dpo."""
    learning_rate: float = Field(default=1e-4, gt=0, le=1.0, title="Learning rate")
    """Peak learning rate of AdamW."""
    scheduler: Literal["cosine", "linear", "constant"] = Field(default="cosine", title="Schedule")
    """How the learning rate falls after the warm-up."""
    warmup_fraction: float = Field(default=0.1, ge=0.0, le=1.0, title="Warm-up")
    """Part of all steps over which the learning rate rises linearly."""
    optimizer: Literal["adamw", "adamw_8bit"] = Field(default="adamw", title="Optimizer")
    """adamw: moments in fp32; adamw_8bit: in 8 bits (torchao, an extra), 2 bytes a trained value in place of 8."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, title="Weight decay")
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0, title="Gradient clipping")
    """Gradients are scaled down to this global norm."""
    num_epochs: float = Field(default=3.0, gt=0, le=1000, title="Epochs")
    """Passes over the training examples."""
    max_steps: int | None = Field(default=None, ge=1, title="Most steps")
    """Stop after this many optimizer steps, whatever the epochs."""
    micro_batch: int = Field(default=16, ge=1, title="Micro batch")
    """Rows of a micro batch: examples, or packs when packing."""
    gradient_accumulation_steps: int = Field(default=1, ge=1, title="Gradient accumulation")
    """Micro batches of one optimizer step; the loss is normalized over the trained tokens of the whole step."""
    packing: bool = Field(default=False, title="Packing")
    """Make a row of several examples, up to tokens_per_pack tokens. The fused engine never pads, packing or not."""
    tokens_per_pack: Literal["auto"] | int = Field(default="auto", title="Tokens a pack")
    """Token budget of a pack and of a forward pass, at least tokenization.max_length. auto: packs by the dataset's
    size, up to 16,384 tokens; forward passes by the free memory."""
    engine: Literal["auto", "fused", "general"] = Field(default="auto", title="Engine")
    """fused: kernels of our own for the dense families that docs/models.md names, whatever the method; general: any
    model of transformers; auto: fused where the model and the method allow it, and a line that says why where not."""
    precision: Literal["auto", "bf16", "fp32"] = Field(default="auto", title="Precision")
    """auto: bf16 on a GPU that has it, fp32 on a CPU."""
    base_weights: Literal["full", "fp8", "nf4"] = Field(default="full", title="Frozen weights")
    """How the frozen base lies in memory: in the precision above; in 8 bits (faster, H100 or later, fused engine); or
    in 4 bits (QLoRA, for small cards, needs bitsandbytes). The merge takes the full weights in any case."""
    gradient_checkpointing: bool | None = Field(default=None, title="Gradient checkpointing")
    """Recompute activations in the backward pass: less memory, slower. Empty: where the memory asks for it."""
    eval_every_steps: int | None = Field(default=None, ge=1, title="Steps between evaluation losses")
    """Empty: ten times a run."""
    early_stopping_patience: int | None = Field(default=None, ge=1, title="Early stopping")
    """Stop after this many evaluations without a better loss. Empty: off."""
    keep: Literal["auto", "best", "last"] = Field(default="auto", title="Adapter to keep")
    """best: of the smallest evaluation loss; last: of the last step; auto: best with early stopping, else last."""
    checkpoint_every_steps: int = Field(default=100, ge=1, title="Steps between checkpoints")
    """A killed run goes on from the last checkpoint."""
    keep_checkpoints: int = Field(default=2, ge=1, title="Checkpoints kept")
    """Older checkpoints are deleted; the best one is always kept."""
    report_to: tuple[Literal["tensorboard"], ...] = Field(default=(), title="Further reports")
    """Where the curves go besides MLflow."""
    num_processes: int = Field(default=1, ge=1, le=1024, title="Processes")
    """Training processes on each machine, one a GPU; the rows of a step are dealt to them."""
    num_nodes: int = Field(default=1, ge=1, le=1024, title="Machines")
    """Machines that train together at most. The run is on one of them; others come, and come back, by `sft join`
    (docs/scale.md)."""
    min_nodes: int = Field(default=1, ge=1, le=1024, title="Fewest machines")
    """Fewer do not train: they wait for others. With strategies that divide the model, as many as hold it."""
    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = Field(default="ddp", title="Several processes")
    """ddp: each holds everything; fsdp: the weights are divided among them, with gradients and optimizer where the
    model's own weights are trained; zero2, zero3 (DeepSpeed, an extra): gradients and optimizer are divided, with zero3
    all weights too. All but ddp train with the general engine."""

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter of the smallest evaluation loss is kept, and not the last one."""
        return self.keep == "best" or (self.keep == "auto" and self.early_stopping_patience is not None)

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained, and not the model's own weights."""
        return self.method == "lora"

    @property
    def is_paired(self) -> bool:
        """Whether pairs of answers are trained."""
        return self.objective == "dpo"

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method != "freeze" and self.trained_modules:
            raise ValueError(f"trained_modules goes with method freeze, and method is {self.method}: leave one out")
        if self.method == "freeze" and not (self.trained_layers or self.trained_modules):
            raise ValueError("method is freeze and trained_layers is 0: name trained_modules, or nothing is trained")
        if self.is_lora:
            return self
        given = [
            name
            for name in ("dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if given:
            raise ValueError(f"method is {self.method}, and {', '.join(given)} belong to method lora: leave them out")
        if self.base_weights != "full":
            raise ValueError(
                f"method is {self.method} and base_weights is {self.base_weights}: only a frozen base can be packed: "
                "set base_weights full, or method lora"
            )
        return self

    @model_validator(mode="after")
    def _check_sweep(self) -> Self:
        if not self.sweep.is_on:
            return self
        if self.num_nodes > 1:
            raise ValueError(f"there is a sweep and num_nodes is {self.num_nodes}: a sweep is trained by one machine")
        if self.sweep.ranks and not self.is_lora:
            raise ValueError(f"sweep.ranks are of method lora, and method is {self.method}: leave ranks out")
        if self.keeps_best or self.early_stopping_patience is not None:
            raise ValueError(
                "a sweep chooses by the held-out loss at the end: leave early_stopping_patience out, and set keep to "
                "last or auto"
            )
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.is_paired and self.router_aux_loss_coef:
            raise ValueError(
                f"objective is dpo and router_aux_loss_coef is {self.router_aux_loss_coef:g}: there is no such loss of "
                "pairs: leave router_aux_loss_coef out"
            )
        return self

    @model_validator(mode="after")
    def _check_every_process_gets_work(self) -> Self:
        if self.min_nodes > self.num_nodes:
            raise ValueError(
                f"min_nodes is {self.min_nodes} and num_nodes is {self.num_nodes}: raise num_nodes, the most machines "
                "that train together, or lower min_nodes"
            )
        num_ranks = self.num_processes * self.num_nodes
        rows_per_step = self.micro_batch * self.gradient_accumulation_steps
        if num_ranks > rows_per_step:
            raise ValueError(
                f"{num_ranks} processes (num_processes {self.num_processes} x num_nodes {self.num_nodes}) share the "
                f"rows of a step, but there are {rows_per_step} (micro_batch {self.micro_batch} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}): raise one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_settings_that_need_each_other(self) -> Self:
        if self.tokens_per_pack != "auto" and self.tokens_per_pack < 8:
            raise ValueError(f"tokens_per_pack is {self.tokens_per_pack}: set auto, or at least 8")
        if self.base_weights == "fp8" and self.engine == "general":
            raise ValueError("base_weights is fp8 and engine is general: only the fused engine has 8-bit weights")
        if self.base_weights == "fp8" and self.precision == "fp32":
            raise ValueError(
                "base_weights is fp8 and precision is fp32: 8-bit weights go with bf16: set precision auto"
            )
        return self

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        if self.strategy == "ddp" or self.num_processes * self.num_nodes == 1:
            return self
        if self.optimizer == "adamw_8bit" and (self.strategy != "fsdp" or not self.is_lora):
            raise ValueError(
                f"optimizer is adamw_8bit and strategy is {self.strategy}, which divides the optimizer: set optimizer "
                "adamw, or strategy ddp"
            )
        if self.base_weights != "full":
            raise ValueError(
                f"base_weights is {self.base_weights} and strategy is {self.strategy}: packed weights are whole on "
                "every process: set base_weights full, or strategy ddp"
            )
        if self.engine == "fused":
            raise ValueError(
                f"engine is fused and strategy is {self.strategy}, which only the general engine does: set engine "
                "auto, or strategy ddp"
            )
        return self


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
