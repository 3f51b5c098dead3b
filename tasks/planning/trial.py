"""A few steps of a training, done to see how fast they are and what memory they take; nothing of them is kept."""

from pathlib import Path

from schemas.config import TrainingConfig
from tasks.training.pace import PaceClock
from tasks.training.process.launch import run_training, settle_processes
from tasks.training.process.messages import TrainingJob

NUM_STEPS, NUM_WARMING = 8, 2


def measure_training(base_model: Path, tokens: Path, folder: Path, config: TrainingConfig, *, seed: int) -> None:
    """Train some steps as the run would, on its own examples, and note the pace after the first ones.

    Args:
        base_model: folder of the base model.
        tokens: folder of examples; the held-out ones are not looked at.
        folder: for what the training leaves; the caller deletes it.
        config: the training section.
        seed: of the run.

    Raises:
        TrainingError: the training cannot be done here.
    """
    trial = settle_processes(config).model_copy(
        update={
            "max_steps": NUM_STEPS,
            "num_epochs": 1000.0,  # of few rows too, there are as many steps
            "keep": "last",
            "early_stopping_patience": None,
            "report_to": (),
        }
    )
    examples = folder / "tokens"
    examples.mkdir(parents=True)
    for name in ("train.parquet", "tokenizer"):
        (examples / name).symlink_to((tokens / name).absolute())
    job = TrainingJob(base_model, examples, folder / "run", trial, seed, identity="trial")
    pace = PaceClock(num_warming=NUM_WARMING, is_trial=True)
    pace.note(run_training(job, on_step=pace.count), job)
