"""The curves as TensorBoard events, beside what the callbacks carry to MLflow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.training.records import EvalRecord, StepRecord

Recorder = Callable[[StepRecord | EvalRecord], None]


@contextmanager
def open_tensorboard(folder: Path, *, first_step: int) -> Iterator[Recorder]:
    """Give a function that writes records as scalars; closes the event file at the end.

    Args:
        folder: gets the event file.
        first_step: steps after it that an interrupted attempt wrote are hidden.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def record(values: StepRecord | EvalRecord) -> None:
        if isinstance(values, EvalRecord):
            for name, value in {"loss": values.loss, **values.figures}.items():
                writer.add_scalar(f"eval/{name}", value, values.step)
            return
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch"):
            writer.add_scalar(f"train/{name}", getattr(values, name), values.step)
        for name, value in values.figures.items():
            writer.add_scalar(f"train/{name}", value, values.step)

    try:
        yield record
    finally:
        writer.close()
