"""What MLflow knows of runs and registered versions, as rows for a terminal or a program."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from tasks import storage, tracking
from tasks.registry.exports import FORM_TAG
from tasks.registry.versions import GATE_TAG, REASONS_TAG, ROLLED_BACK_TAG, RUN_TAG

_ID_LENGTH = 8


@dataclass(frozen=True)
class RunRow:
    """A run of the pipeline."""

    run: str
    """MLflow's id."""
    started: str
    name: str
    status: str
    """MLflow's."""
    is_interrupted: bool
    """It was cut short, and the same command goes on with it: stopped, or its process on this machine is gone."""
    seconds: float | None
    """None where it has not ended, or where the clock was set back meanwhile."""
    version: str
    """NAME/VERSION, or nothing."""
    verdict: str
    failure: str
    """Why it failed or was interrupted; empty where it was not, or where that is not known."""


@dataclass(frozen=True)
class VersionRow:
    """A registered version."""

    version: str
    """NAME/VERSION"""
    aliases: str
    registered: str
    base_model: str
    verdict: str
    """The gate's; of an export, which no gate has judged, that it is one."""
    reasons: str
    """Why the gate let it pass or refused it, or why it was rolled back; of an export, how near it is."""
    run: str


@dataclass(frozen=True)
class RunComparison:
    """Runs beside each other."""

    runs: tuple[str, ...]
    settings: dict[str, tuple[str, ...]]
    """Those that differ."""
    metrics: dict[str, tuple[float | None, ...]]


def list_runs(*, limit: int) -> list[RunRow]:
    """Return the newest runs of the pipeline in all experiments, the newest first."""
    return [_describe_run(run) for run in _search_runs(limit)]


def list_versions(name: str | None) -> list[VersionRow]:
    """Return all versions of one registered model, or of all, by name and the newest first.

    Raises:
        ValueError: there is no registered model of this name.
    """
    client = tracking.client()
    names = sorted(model.name for model in tracking.read_pages(client.search_registered_models))
    if name is not None and name not in names:
        raise ValueError(f"no registered model is called {name}; there are: {', '.join(names) or 'none'}")
    rows: list[VersionRow] = []
    known: dict[str, list[ModelVersion]] = {}
    # Of all and not by a query for each name: MLflow's queries take no name with a quotation mark.
    for version in tracking.read_pages(client.search_model_versions):
        known.setdefault(version.name, []).append(version)
    for each in [name] if name else names:
        aliases = client.get_registered_model(each).aliases
        versions = known.get(each, [])
        for version in sorted(versions, key=lambda version: -int(version.version)):
            if RUN_TAG not in version.tags:
                continue
            reasons = version.tags.get(ROLLED_BACK_TAG) or version.tags.get(REASONS_TAG, "")
            rows.append(
                VersionRow(
                    version=f"{each}/{version.version}",
                    aliases=", ".join(sorted(alias for alias, number in aliases.items() if number == version.version)),
                    registered=_format_time(version.creation_timestamp),
                    base_model=version.tags.get("sft.base_model", ""),
                    verdict=_tell_verdict(version.tags),
                    reasons=reasons,
                    run=version.tags[RUN_TAG],
                )
            )
    return rows


def _tell_verdict(tags: Mapping[str, str]) -> str:
    if ROLLED_BACK_TAG in tags:
        return "rolled back"
    return "exported" if FORM_TAG in tags else tags.get(GATE_TAG, "")


def compare_runs(runs: Sequence[str]) -> RunComparison:
    """Return the settings in which runs differ, and their metrics.

    Args:
        runs: ids, or their beginnings.

    Raises:
        ValueError: an id is not known, or begins several.
    """
    found = [find_run(run) for run in runs]
    settings = {}
    for name in sorted({name for run in found for name in run.data.params}):
        values = tuple(run.data.params.get(name, "") for run in found)
        if len(set(values)) > 1:
            settings[name] = values
    names = sorted({name for run in found for name in run.data.metrics if not name.startswith("system/")})
    metrics = {name: tuple(run.data.metrics.get(name) for run in found) for name in names}
    return RunComparison(tuple(run.info.run_id for run in found), settings, metrics)


def as_values(rows: Sequence[RunRow | VersionRow]) -> list[dict[str, Any]]:
    """Return rows as JSON's values."""
    return [asdict(row) for row in rows]


def shorten_id(run: str) -> str:
    """Return enough of an id to name a run by."""
    return run[:_ID_LENGTH]


def _search_runs(limit: int) -> list[Run]:
    client = tracking.client()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.`{tracking.CONFIG_TAG}` LIKE '%'"
    return list(
        client.search_runs(experiments, query, max_results=limit, order_by=["attributes.start_time DESC"])
        if experiments
        else []
    )


def find_run(beginning: str) -> Run:
    """Return the run with an id, or the only one whose id begins so.

    Raises:
        ValueError: there is none, or there are several.
    """
    try:
        return tracking.client().get_run(beginning)
    except mlflow.MlflowException:
        pass  # not a whole id
    found = [run for run in _search_runs(1000) if run.info.run_id.startswith(beginning)]
    if len(found) != 1:
        several = ", ".join(run.info.run_id for run in found)
        raise ValueError(
            f"run {beginning}: {f'begins several ids ({several})' if found else 'not known'}; `sft runs` lists them"
        )
    return found[0]


def _describe_run(run: Run) -> RunRow:
    ended = run.info.end_time
    return RunRow(
        run=run.info.run_id,
        started=_format_time(run.info.start_time),
        name=run.info.run_name or "",
        status=run.info.status,
        is_interrupted=run.info.status == "KILLED" or (run.info.status == "RUNNING" and _is_gone(run)),
        seconds=None
        if ended is None or ended < run.info.start_time
        else round((ended - run.info.start_time) / 1000, 1),
        version=run.data.tags.get("sft.version", ""),
        verdict=run.data.tags.get("sft.verdict", ""),
        failure=run.data.tags.get(tracking.FAILURE_TAG, "") if run.info.status in ("FAILED", "KILLED") else "",
    )


def _is_gone(run: Run) -> bool:
    """Say whether a run of this machine has no process any more; of another machine's nobody here knows."""
    return run.data.tags.get(tracking.HOST_TAG) == platform.node() and not storage.is_held(run.info.run_id)


def _format_time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M")
