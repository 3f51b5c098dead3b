"""One parent run a pipeline run, one child run a stage, across processes, retries and resumes."""

import json
import logging
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import mlflow
from mlflow.entities import Experiment, LifecycleStage, Param, Run, RunStatus, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from pydantic import BaseModel, ValidationError

from schemas.artifacts import DatasetRef, Ref, RunReport
from schemas.config import RunConfig
from tasks import storage
from tasks.tracking.artifacts import ArtifactError, log_dataset, resolve
from tasks.tracking.calls import at_once
from tasks.tracking.connection import artifact_root, client, experiment_of, get_run, tracking_uri, version_link
from tasks.tracking.curves import log_metrics
from tasks.tracking.stopwatch import stopwatch, tracking_time

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
STAGE_TAG = "sft.stage"
RESULT_TAG = "sft.result"
TAKES_TAG = "sft.takes."
"""Begins the tags that name the runs whose kept results a pipeline run has taken, set when it takes them."""
CONFIG_TAG = "sft.config_digest"
FAILURE_TAG = "sft.failure"
HOST_TAG = "sft.host"
"""Name of the machine that began a run."""
CONFIG_FILE = "config.json"
_MAX_PARAM_CHARS = 500  # MLflow takes 6,000; longer than this nobody reads in a table

_KIND = {"mlflow.experimentKind": "custom_model_development"}

R = TypeVar("R", bound=Ref)


def open_experiment(name: str) -> str:
    """Return the id of an experiment, made when missing.

    Its kind says that it holds trainings; the pages of MLflow 3.17 go by their address instead, so links say it.
    """
    found = client().get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != LifecycleStage.ACTIVE:
            raise ValueError(f"MLflow experiment {name!r} is deleted: restore it, or set another name in the config")
        _set_kind(found)
        return str(found.experiment_id)
    embedded = tracking_uri().startswith("sqlite:///")
    location = (artifact_root() or (storage.home() / "artifacts").as_uri()) if embedded else None
    try:
        return str(client().create_experiment(name, artifact_location=location, tags=_KIND))
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return open_experiment(name)  # another run made it in between


def _set_kind(experiment: Experiment) -> None:
    """Give an experiment without a kind ours; whoever may only read it goes on without."""
    if _KIND.keys() & experiment.tags.keys():
        return
    with suppress(mlflow.MlflowException):
        for key, value in _KIND.items():
            client().set_experiment_tag(experiment.experiment_id, key, value)


def create_parent_run(config: RunConfig, *, run_name: str, config_digest: str, tags: Mapping[str, str]) -> str:
    """Open the MLflow run of a pipeline run with its resolved config, and return its id."""
    run = client().create_run(
        open_experiment(config.name),
        run_name=run_name,
        tags={CONFIG_TAG: config_digest, HOST_TAG: platform.node(), **tags},
    )
    run_id = str(run.info.run_id)
    values = config.model_dump(mode="json")
    client().log_dict(run_id, values, CONFIG_FILE)
    _log_params(run_id, values)
    return run_id


def _log_params(run_id: str, values: Mapping[str, Any]) -> None:
    """Log nested values as dotted params in one call, long ones shortened (the whole config is an artifact)."""
    params = [Param(name, str(value)[:_MAX_PARAM_CHARS]) for name, value in _flatten(values)]
    client().log_batch(run_id, params=params)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def recorded_config(run_id: str) -> dict[str, Any]:
    """Return the config a parent run was started with."""
    with TemporaryDirectory() as folder:  # MLflow would leave one of its own
        path = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=CONFIG_FILE, dst_path=folder, tracking_uri=tracking_uri()
        )
        values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return values


def find_interrupted_runs(experiment: str) -> list[Run]:
    """Return parent runs of an experiment that neither finished nor failed, newest first."""
    found = client().get_experiment_by_name(experiment)
    if found is None:
        return []
    runs = client().search_runs(
        [found.experiment_id], f"tags.`{CONFIG_TAG}` LIKE '%'", order_by=["attributes.start_time DESC"]
    )
    return [run for run in runs if run.info.status in ("RUNNING", "KILLED")]


def find_runs(experiment: str, tag: str, value: str) -> list[Run]:
    """Return an experiment's parent runs with this value of a tag, newest first."""
    found = client().get_experiment_by_name(experiment)
    if found is None:
        return []
    query = f"tags.`{CONFIG_TAG}` LIKE '%' AND tags.`{tag}` = '{value}'"
    return list(client().search_runs([found.experiment_id], query, order_by=["attributes.start_time DESC"]))


def reopen_run(run_id: str) -> None:
    """Set an interrupted run to RUNNING again."""
    client().update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))


def end_run(run_id: str, status: str) -> None:
    """End a run as FINISHED, FAILED or KILLED."""
    client().set_terminated(run_id, status=status)


@tracking_time()
def set_tags(run_id: str, tags: Mapping[str, Any]) -> None:
    """Set tags of a run, as text, in one call."""
    client().log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])


@contextmanager
def stage_run(
    parent_run_id: str,
    stage: str,
    settings: BaseModel | Mapping[str, Any] | None = None,
    *,
    system_metrics: bool = False,
) -> Iterator[str]:
    """Open the stage's child run, or reopen the one an interrupted attempt left, and end it rightly.

    A finished one has two metrics: `stage/seconds`, and how many of these went into tracking.

    Args:
        parent_run_id: run of the pipeline run.
        stage: name of the child run.
        settings: of the stage, logged as the parameters of a new run.
        system_metrics: sample what the machine does meanwhile.
    """
    earlier = _find_stage_run(parent_run_id, stage)
    if earlier is not None:
        run_id = str(earlier.info.run_id)
        reopen_run(run_id)
    else:
        experiment = experiment_of(parent_run_id)
        tags = {PARENT_TAG: parent_run_id, STAGE_TAG: stage}
        run_id = str(client().create_run(experiment, run_name=stage, tags=tags).info.run_id)
        if settings is not None:
            _log_params(run_id, settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings)
    monitor = SystemMetricsMonitor(run_id, resume_logging=earlier is not None) if system_metrics else None
    if monitor is not None:
        monitor.start()
    status, start = "KILLED", time.perf_counter()
    try:
        with stopwatch() as spent:
            yield run_id
        seconds = time.perf_counter() - start
        log_metrics(run_id, {"stage/seconds": seconds, "stage/tracking_seconds": spent[0]})
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        if monitor is not None:
            monitor.finish()
        end_run(run_id, status)


@tracking_time()
def remember(run_id: str, ref: Ref) -> None:
    """Keep the stage's result with its run, for `recall`."""
    client().set_tag(run_id, RESULT_TAG, ref.model_dump_json())


def recall(parent_run_id: str, stage: str, kind: type[R]) -> R | None:
    """Return the result of a stage that an interrupted pipeline run had finished, or None.

    A parent run has one config, one dataset and one base model (a resume with others is refused), so that a stage
    that finished under it need not run again, unless its files are gone or damaged, or another release wrote its
    result, which the log says.
    """
    run = _find_stage_run(parent_run_id, stage)
    if run is None or run.info.status != "FINISHED" or RESULT_TAG not in run.data.tags:
        return None
    try:
        ref = kind.model_validate_json(run.data.tags[RESULT_TAG])
        resolve(ref)
    except ValidationError:
        logger.warning("Stage %s runs again: its result was written by another release", stage)
        return None
    except ArtifactError as error:
        logger.warning("Stage %s runs again, its result is lost: %s", stage, error)
        return None
    return ref


def _find_stage_run(parent_run_id: str, stage: str) -> Run | None:
    found = client().search_runs(
        [experiment_of(parent_run_id)],
        f"tags.`{PARENT_TAG}` = '{parent_run_id}' AND tags.`{STAGE_TAG}` = '{stage}'",
        max_results=1,
    )
    return found[0] if found else None


def finish_parent(run_id: str, report: RunReport, dataset: DatasetRef, stages: Mapping[str, Ref]) -> None:
    """Log the report and the dataset on the parent run, and name the runs whose cached results it used."""
    parent, *owners = at_once(
        *(partial(get_run, known) for known in (run_id, *(str(ref.mlflow_run_id) for ref in stages.values())))
    )
    tags = {MLFLOW_RUN_NOTE: _describe(report, parent.data.tags.get("sft.prefect_url"))}
    for (stage, ref), owner in zip(stages.items(), owners, strict=True):
        if owner.data.tags.get(PARENT_TAG) != run_id:
            tags[f"sft.reused.{stage}"] = str(ref.mlflow_run_id)
    record = partial(
        log_dataset,
        run_id,
        name="dataset",
        digest=dataset.digest,
        source=dataset.uri,
        profile=report.dataset.model_dump(mode="json"),
        context="training",
    )
    write = partial(client().log_dict, run_id, report.model_dump(mode="json"), "run_report.json")
    at_once(partial(set_tags, run_id, tags), record, write)


def _describe(report: RunReport, prefect_page: str | None) -> str:
    """Return the description that the run's page shows first."""
    entry, flow_run = report.registry, report.prefect_flow_run_id
    name = f"{entry.name} version {entry.version}"
    page = version_link(entry.name, entry.version)
    lines = [f"**{f'[{name}]({page})' if page else name}: {entry.verdict}**", ""]
    lines += [report.evaluation.sentence, "", *(f"- {reason}" for reason in entry.reasons)]
    lines += ["", *(f"- Please note: {warning}" for warning in report.evaluation.warnings)]
    compared = "base, champion and fine-tuned model" if report.evaluation.champion else "base and fine-tuned model"
    lines += [
        "",
        f"Artifacts: `report/report.html` compares {compared}, `gate/gate.md` has the gate's verdict, "
        "`quality/quality.html` shows rows and masks, `side_by_side.json` has every held-out row.",
        f"Prefect flow run: [{flow_run}]({prefect_page})" if prefect_page else f"Prefect flow run: `{flow_run}`",
    ]
    return "\n".join(lines)
