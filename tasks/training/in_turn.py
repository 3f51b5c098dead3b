"""The candidates of a sweep one after the other, where they cannot be trained side by side."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tasks.training.checkpoints import CheckpointError
from tasks.training.choosing import Candidate, choose
from tasks.training.place import Place
from tasks.training.records import EvalRecord, TrainingError, TrainingOutcome

logger = logging.getLogger(__name__)

Train = Callable[..., TrainingOutcome]


def train_in_turn(
    base_model: Path,
    tokens: Path,
    run_folder: Path,
    candidates: list[Candidate],
    train: Train,
    arguments: dict[str, Any],
    listeners: dict[str, Callable[[Any], None]],
    place: Place | None = None,
) -> TrainingOutcome:
    """Train the candidates one after the other; return the winner's outcome with a report on all."""
    outcomes: dict[str, TrainingOutcome] = {}
    for candidate in candidates:

        def tell(listener: Callable[[Any], None], name: str, record: Any) -> None:
            kept = ("loss", "grad_norm", "learning_rate")
            figures = {f"{name}/{key}": getattr(record, key) for key in kept if hasattr(record, key)}
            listener(replace(record, figures=figures))

        def note(record: EvalRecord, own: Candidate = candidate) -> None:
            own.progress.evaluations.append(record)
            tell(listeners["on_eval"], own.name, record)

        try:
            outcomes[candidate.name] = train(
                base_model, tokens, run_folder / "candidates" / candidate.name, candidate.config, seed=candidate.seed,
                **{**arguments, "identity": f"{arguments['identity']} {candidate.name}"},
                on_step=partial(tell, listeners["on_step"], candidate.name), on_eval=note,
                place=None if place is None else place.below(f"candidates/{candidate.name}"),
            )  # fmt: skip
        except CheckpointError:
            raise
        except TrainingError as error:
            candidate.progress.failure = str(error)
            logger.warning("%s is given up: %s", candidate.name, error)
            continue
        best = outcomes[candidate.name].best_eval_loss
        if best is None:
            raise TrainingError(
                "training.sweep chooses by held-out loss, and there are no held-out examples: set data.eval_fraction"
            )
    if not outcomes:
        raise TrainingError(f"every candidate of the sweep was given up, the last one with: {candidates[-1].failure}")
    report = choose(candidates)
    logger.info(report.sentence)
    return replace(outcomes[report.winner], sweep=report)
