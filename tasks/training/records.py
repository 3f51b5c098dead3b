"""What a training reports: one record a step, one an evaluation, and the outcome."""

from dataclasses import dataclass, field
from pathlib import Path

from schemas.artifacts import AdaptedWeights, SweepReport


class TrainingError(ValueError):
    """The training cannot start or go on; the message says where, what, and the way out."""


class TrainingStopped(Exception):  # noqa: N818 (nothing went wrong)
    """The training was asked to stop and did, between two steps and after a checkpoint."""


class TrainingCrash(RuntimeError):  # noqa: N818
    """The training's process ended or fell silent without saying why; the message has the end of its log."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """Steps finished, from 1."""
    num_steps: int
    """Steps of the whole training."""
    epoch: float
    """Passes over the training examples finished, with fractions."""
    loss: float
    """Nats a trained token, over all trained tokens of the step; of pairs, their mean loss."""
    learning_rate: float
    grad_norm: float
    """Global norm of the gradient, before clipping."""
    num_tokens: int
    """Tokens of the step without padding."""
    num_trained_tokens: int
    """Tokens of the step that the loss counts."""
    tokens_per_second: float
    """num_tokens over the step's duration."""
    memory_bytes: int = 0
    """GPU allocation at its highest in this step on a GPU, resident memory of the process on a CPU."""
    utilisation: float | None = None
    """Part of the last second or less in which the GPU was at work, 0 to 1, as its driver counts; none on a CPU."""
    share_of_peak: float | None = None
    """Useful work a second over what large bf16 matrix products reach on this GPU (see throughput); none on a CPU."""
    work: dict[str, int] = field(default_factory=dict)
    """What the step went through the model as, over all ranks; see `step_work.count_work`. Nothing of a sweep."""
    figures: dict[str, float] = field(default_factory=dict)
    """What the objective tells besides."""


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation loss on the held-out examples."""

    step: int
    num_steps: int
    epoch: float
    loss: float
    """Nats a trained token, over all held-out examples; of pairs, their mean loss."""
    train_loss: float
    """Mean training loss of the steps since the evaluation before."""
    is_best: bool
    """No evaluation before had a smaller loss."""
    figures: dict[str, float] = field(default_factory=dict)
    """What the objective tells besides."""


@dataclass(frozen=True)
class TrainingOutcome:
    """Where the adapter is, and how the training went."""

    adapter: Path
    """Folder in PEFT's format."""
    num_steps: int
    """Optimizer steps done, over all resumes."""
    final_loss: float
    """Mean loss (nats a token) over the last tenth of the steps."""
    best_eval_loss: float | None
    """Smallest evaluation loss; none without held-out examples."""
    adapter_step: int
    """Step that the adapter comes from: the best one with early stopping, else the last."""
    resumed_from_step: int | None
    """Checkpoint that this process went on from; none when it started afresh."""
    num_examples: int
    num_packs: int
    """Rows after packing; the number of examples when not packing."""
    packing_efficiency: float
    """Tokens over num_packs * tokens_per_pack; 1.0 when not packing."""
    num_trained_tokens: int
    """Trained tokens seen, over all epochs."""
    num_trainable_parameters: int
    tokens_per_second: float
    """Non-padding tokens a second, without evaluations and checkpoints."""
    peak_memory_bytes: int
    """GPU allocation on a GPU, resident memory of the process on a CPU."""
    adapted: tuple[AdaptedWeights, ...]
    """Which of the base's weights the adapter stands beside, by kind."""
    warnings: tuple[str, ...]
    """What a person should know, such as over-fitting or a damaged checkpoint."""
    engine: str = ""
    """That trained, and what it was fitted to."""
    device: str = ""
    """GPU's or CPU's name."""
    flop_per_token: float = 0.0
    """Useful work; see throughput."""
    recomputed_part: float = 0.0
    """Of the layers, those that ran again in the backward pass."""
    is_flat: bool = True
    """Whether examples lay end to end, without padding."""
    room_tokens: int = 0
    """Tokens of a pass that fit into the memory; 0 where nobody looked."""
    piece_tokens: int = 0
    """Of the pieces in which gated layers ran for the sake of long examples; 0: whole."""
    num_in_host: int = 0
    """Layers whose inputs lay in the host's memory, for the sake of long examples."""
    sweep: SweepReport | None = None
    """Of several candidates, of which this is the winner."""
