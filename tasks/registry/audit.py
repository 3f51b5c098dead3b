"""The audit trail of a registered model: who moved the alias champion, when, from where to where, why, on what ground.

It is kept twice. Each move is a tag of the registered model, written once and never changed: it outlives every run. And
each move is a run of its own in the experiment `sft-registry`: a table that a person can read, sort and search, which
outlives the registered model. Both are written before the alias moves, so that no move goes unrecorded.
"""

import getpass
import os
import platform
import re
from datetime import UTC, datetime
from functools import partial

from mlflow.entities import RunStatus
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from schemas.artifacts import Move
from tasks import tracking
from tasks.registry.versions import (
    GATE_TAG,
    MODEL_TAG,
    PARITY_TAG,
    REASONS_TAG,
    ROLLED_BACK_TAG,
    RUN_TAG,
)

EXPERIMENT = "sft-registry"
_TAG = "sft.move."
_BEGIN, _END = "### Champions", "Each move with its evidence: tags `sft.move.…` here, and the experiment"
_EVIDENCE = {
    "mlflow_run": RUN_TAG,
    "gate": GATE_TAG,
    "reasons": REASONS_TAG,
    "parity": PARITY_TAG,
    "rolled_back": ROLLED_BACK_TAG,
    "model_digest": MODEL_TAG,
    "dataset_digest": "sft.dataset_digest",
    "git_commit": "sft.git_commit",
}
_ROWS_SHOWN = 10
_MAX_DESCRIPTION = 5000  # MLflow's column
_MAX_CELL = 160


def describe_user() -> str:
    """Return who acts: SFT_USER, or user@machine."""
    if given := os.environ.get("SFT_USER"):
        return given
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # containers run under ids that have no name
        user = f"uid {os.getuid()}"
    return f"{user}@{platform.node()}"


def list_moves(model: RegisteredModel) -> list[Move]:
    """Return all moves that a registered model had when it was read, the oldest first."""
    return sorted(
        (Move.model_validate_json(value) for key, value in model.tags.items() if key.startswith(_TAG)),
        key=lambda move: move.number,
    )


def list_former_champions(moves: list[Move]) -> list[str]:
    """Return the versions that were champion before the present one, the latest last: a stack, a rollback pops it."""
    stack: list[str] = []
    for move in moves:
        if move.action == "rollback":
            stack = stack[:-1]
            # What the rollback went to need not be the one below: aliases can be set by hand.
            if move.version_to is not None and stack[-1:] != [move.version_to]:
                stack.append(move.version_to)
        elif move.version_to is not None and stack[-1:] != [move.version_to]:
            stack.append(move.version_to)
    return stack[:-1]


def compose_move(
    action: str,
    candidate: ModelVersion,
    champion: str | None,
    moves: list[Move],
    *,
    who: str,
    why: str,
    forced: bool,
) -> Move:
    """Return a move to a candidate as the next of the trail, with what speaks for it."""
    tags = candidate.tags
    return Move.model_validate(
        {
            "number": len(moves) + 1,
            "action": action,
            "name": candidate.name,
            "version_from": champion,
            "version_to": str(candidate.version),
            "who": who,
            "when": now(),
            "why": why or "no reason given",
            "forced": forced,
            "evidence": {what: tags[tag] for what, tag in _EVIDENCE.items() if tags.get(tag)},
        }
    )


def record_move(move: Move) -> None:
    """Write a move to the registered model and as a run of its own."""
    value = move.model_dump_json()
    tracking.at_once(
        partial(tracking.client().set_registered_model_tag, move.name, f"{_TAG}{move.number:06d}", value),
        partial(_record_run, move),
    )


def _record_run(move: Move) -> None:
    client = tracking.client()
    title = f"{move.name}: {describe_move(move)}"
    run = client.create_run(
        tracking.open_experiment(EXPERIMENT),
        run_name=f"{title}, {move.when[:16].replace('T', ' ')}",
        tags={f"sft.{key}": str(value) for key, value in move.model_dump(exclude={"evidence"}).items()}
        | {f"sft.evidence.{key}": value for key, value in move.evidence.items()}
        | {MLFLOW_RUN_NOTE: f"**{title}** by {move.who}: {move.why}"},
    )
    run_id = str(run.info.run_id)
    tracking.at_once(
        partial(client.log_dict, run_id, move.model_dump(mode="json"), "move.json"),
        partial(tracking.end_run, run_id, RunStatus.to_string(RunStatus.FINISHED)),
    )


def describe_move(move: Move) -> str:
    """Return a move in a few words."""
    to = f"version {move.version_to}" if move.version_to else "no champion"
    if move.action == "found":
        return f"{to} found as champion, moved by other means"
    words = "back to" if move.action == "rollback" else "to"
    return f"champion {words} {to}" + (f" from version {move.version_from}" if move.version_from else "")


def show_moves(model: RegisteredModel, moves: list[Move]) -> None:
    """Write the latest moves into the description of a registered model; what a person wrote there stays."""
    text = model.description or ""
    kept = re.sub(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}[^\n]*", "", text, flags=re.DOTALL).rstrip()
    for num_rows in range(min(_ROWS_SHOWN, len(moves)), -1, -1):
        whole = f"{kept}\n\n{_moves_table(moves[len(moves) - num_rows :])}".lstrip()
        if len(whole) <= _MAX_DESCRIPTION:
            tracking.client().update_registered_model(model.name, description=whole)
            return


def _moves_table(moves: list[Move]) -> str:
    lines = [_BEGIN, "", "| when (UTC) | what | who | why |", "| --- | --- | --- | --- |"]
    for move in reversed(moves):
        cells = (move.when[:16].replace("T", " "), describe_move(move), move.who, move.why)
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join([*lines, "", f"{_END} `{EXPERIMENT}`."])


def _cell(text: str) -> str:
    line = " ".join(text.replace("|", "\\|").split())
    return line if len(line) <= _MAX_CELL else line[: _MAX_CELL - 1] + "…"


def now() -> str:
    """Return the time as the trail writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
