"""The training section of the configuration, with preferences and sweeps."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.section import Section


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


SETTINGS_OF_PLACE = ("num_processes", "num_nodes", "min_nodes", "strategy")
"""Settings of a training that say where it is computed, and do not change what comes out: it can go on with others."""


class TrainingConfig(Section):
    """What is trained, and how."""

    shown_first = (
        *("num_epochs", "learning_rate", "rank", "alpha", "micro_batch", "gradient_accumulation_steps"),
        *("max_steps", "method", "objective"),
    )
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
    """fused: kernels of our own for the families that docs/models.md names, whatever the method; general: any
    model of transformers; auto: fused where the model and the method allow it, and a line that says why where not."""
    precision: Literal["auto", "bf16", "fp32"] = Field(default="auto", title="Precision")
    """auto: bf16 on a GPU that has it, fp32 on a CPU."""
    base_weights: Literal["full", "fp8", "nf4"] = Field(default="full", title="Frozen weights")
    """How the frozen base lies in memory: in the precision above; in 8 bits (faster, H100 or later, fused engine;
    routed experts take half the memory, dense layers as much as in 16 bits); or in 4 bits (QLoRA, for small cards,
    needs bitsandbytes). The merge takes the full weights in any case."""
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
    num_processes: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(default=1, title="Processes")
    """Training processes on each machine, one a GPU; the rows of a step are dealt to them. auto: as many as the machine
    that trains has GPUs, and no more than a step has rows for."""
    num_nodes: int = Field(default=1, ge=1, le=1024, title="Machines")
    """Machines that train together at most. The run is on one of them; others come, and come back, by `sft join`
    (docs/scale.md)."""
    min_nodes: int = Field(default=1, ge=1, le=1024, title="Fewest machines")
    """Fewer do not train: they wait for others. With strategies that divide the model, as many as hold it."""
    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = Field(default="ddp", title="Several processes")
    """ddp: each holds everything; fsdp: the weights are divided among them, with gradients and optimizer where the
    model's own weights are trained; zero2, zero3 (DeepSpeed, an extra): gradients and optimizer are divided, with zero3
    all weights too. The fused engine trains with ddp, and with LoRA with fsdp; the general one with all."""

    context_parallel: int = Field(default=1, ge=1, le=64, title="Processes that share an example")
    """For examples that do not fit on one GPU: so many neighbouring processes of a machine each hold a part of the
    tokens of every forward pass, and exchange attention heads (fused engine, LoRA without dropout)."""

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter of the smallest evaluation loss is kept, and not the last one."""
        return self.keep == "best" or (self.keep == "auto" and self.early_stopping_patience is not None)

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained, and not the model's own weights."""
        return self.method == "lora"

    @property
    def num_own_processes(self) -> int:
        """Processes on each machine; auto is one until the machine that trains has said how many it has."""
        return 1 if self.num_processes == "auto" else self.num_processes

    @property
    def num_ranks(self) -> int:
        """Processes on all machines together."""
        return self.num_own_processes * self.num_nodes

    @property
    def rows_per_step(self) -> int:
        """Rows (packs, or examples where they are not packed) of an optimizer step, over all processes."""
        return self.micro_batch * self.gradient_accumulation_steps

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
        num_ranks = self.num_ranks // self.context_parallel
        if num_ranks > self.rows_per_step:
            raise ValueError(
                f"{num_ranks} processes (num_processes {self.num_processes} x num_nodes {self.num_nodes}) share the "
                f"rows of a step, but there are {self.rows_per_step} (micro_batch {self.micro_batch} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}): raise one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_shared_examples(self) -> Self:
        size = self.context_parallel
        if size == 1:
            return self
        if self.num_processes == "auto" or self.num_processes % size:
            raise ValueError(
                f"context_parallel is {size} and num_processes is {self.num_processes}: set num_processes to a "
                f"multiple of {size}"
            )
        needs = {
            "method": (self.method, "lora"),
            "objective": (self.objective, "sft"),
            "dropout": (self.dropout, 0.0),
            "strategy": (self.strategy, "ddp"),
            "engine": (self.engine if self.engine == "general" else "auto", "auto"),
            "sweep": ("one" if self.sweep.is_on else "none", "none"),
        }
        for name, (given, wanted) in needs.items():
            if given != wanted:
                raise ValueError(f"context_parallel is {size}, which goes with {name} {wanted}, and {name} is {given}")
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
        if self.strategy == "ddp" or (self.num_ranks == 1 and self.num_processes != "auto"):
            return self
        if self.optimizer == "adamw_8bit" and (self.strategy != "fsdp" or not self.is_lora):
            raise ValueError(
                f"optimizer is adamw_8bit and strategy is {self.strategy}, which divides the optimizer: set optimizer "
                "adamw, or strategy ddp"
            )
        is_fused = self.strategy == "fsdp" and self.is_lora
        if self.base_weights != "full" and not (is_fused and self.base_weights == "fp8"):
            raise ValueError(
                f"base_weights is {self.base_weights} and strategy is {self.strategy}: packed weights are whole on "
                "every process: set base_weights full, or strategy ddp"
            )
        if self.engine == "fused" and not is_fused:
            raise ValueError(
                f"engine is fused and strategy is {self.strategy}, which only the general engine does"
                f"{'' if self.is_lora else ' with weights of the model itself'}: set engine auto, or strategy ddp"
            )
        return self
