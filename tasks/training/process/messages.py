"""What the launcher and a training process say to each other: the job as a JSON file, everything else as JSON lines."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from schemas.artifacts import AdaptedWeights, SweepReport
from schemas.config import TrainingConfig
from tasks.training.records import EvalRecord, StepRecord, TrainingOutcome

ADDRESS_VARIABLE = "SFT_LAUNCHER_ADDRESS"
"""Path of the launcher's socket, for its processes."""
STOP = b"stop\n"
"""Said by the launcher: write a checkpoint at the next step border and leave."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything that `train_adapter` has to be told."""

    base_model: Path
    tokens: Path
    run_folder: Path
    config: TrainingConfig
    seed: int
    identity: str
    place: str | None = None
    """Address of what machines share of this training; none where it is alone on this one."""
    endpoint: str | None = None
    """host:port at which several machines meet (torchrun's --rdzv-endpoint)."""
    round_id: str = ""
    """What they meet under (torchrun's --rdzv-id)."""
    leads: bool = True
    """The pipeline's run is on this machine."""
    tokens_address: str | None = None
    """Of the tokens' folder in a store, where the one here lacks parts of a large train.parquet."""


def write_job(job: TrainingJob, path: Path) -> None:
    """Write a job for `read_job`; its folders become absolute."""
    values = {
        "base_model": str(job.base_model.absolute()),
        "tokens": str(job.tokens.absolute()),
        "run_folder": str(job.run_folder.absolute()),
        "config": job.config.model_dump(mode="json"),
        "seed": job.seed,
        "identity": job.identity,
        "place": job.place,
        "endpoint": job.endpoint,
        "round_id": job.round_id,
        "leads": job.leads,
        "tokens_address": job.tokens_address,
    }
    path.write_text(json.dumps(values), encoding="utf-8")


def read_job(path: Path) -> TrainingJob:
    """Read a job."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    folders = {name: Path(values[name]) for name in ("base_model", "tokens", "run_folder")}
    return TrainingJob(**{**values, **folders, "config": TrainingConfig.model_validate(values["config"])})


def encode(kind: str, values: Mapping[str, Any]) -> bytes:
    """Return a line. Kinds: hello, beat, log, team, step, eval, outcome, stopped, error."""
    return json.dumps({"kind": kind, **values}).encode() + b"\n"


def describe_outcome(outcome: TrainingOutcome) -> dict[str, Any]:
    """Return an outcome as JSON values."""
    adapted = [row.model_dump(mode="json") for row in outcome.adapted]
    sweep = None if outcome.sweep is None else outcome.sweep.model_dump(mode="json")
    return {**asdict(outcome), "adapter": str(outcome.adapter), "adapted": adapted, "sweep": sweep}


def read_outcome(values: Mapping[str, Any]) -> TrainingOutcome:
    """Return the outcome that a line tells of."""
    kept = {name: value for name, value in values.items() if name != "kind"}
    adapted = tuple(AdaptedWeights.model_validate(row) for row in kept["adapted"])
    warnings = tuple(kept["warnings"])
    sweep = None if kept["sweep"] is None else SweepReport.model_validate(kept["sweep"])
    changed = {"adapter": Path(kept["adapter"]), "adapted": adapted, "warnings": warnings, "sweep": sweep}
    return TrainingOutcome(**{**kept, **changed})


def read_step(values: Mapping[str, Any]) -> StepRecord:
    """Return the step that a line tells of."""
    return StepRecord(**{name: value for name, value in values.items() if name != "kind"})


def read_evaluation(values: Mapping[str, Any]) -> EvalRecord:
    """Return the evaluation that a line tells of."""
    return EvalRecord(**{name: value for name, value in values.items() if name != "kind"})
