"""Runs, artifacts and lineage in MLflow: one parent run a pipeline run, one child run a stage.

Every call names its run: MLflow's notion of an active run is a thread's, and tasks change threads.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlparse

import mlflow
import polars as pl
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, LifecycleStage, Metric, Param, Run, RunStatus
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from schemas.artifacts import DatasetRef, Ref, RunReport
from schemas.config import RunConfig
from tasks import storage

PARENT_TAG = "mlflow.parentRunId"
STAGE_TAG = "sft.stage"
RESULT_TAG = "sft.result"
CONFIG_TAG = "sft.config_digest"
CONFIG_FILE = "config.json"
MODEL_SUBFOLDER = "artifacts/model"  # where a logged model keeps the folder it was logged from
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_METRICS_A_CALL = 1000  # MLflow takes no more in one
_SEND_SECONDS = 2.0
_MAX_PARAM_CHARS = 500  # MLflow takes 6,000; longer than this nobody reads in a table


R = TypeVar("R", bound=Ref)


class ArtifactError(ValueError):
    """An artifact is gone, or is not what its digest says."""


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or the SQLite file under SFT_HOME."""
    return os.environ.get(_URI_VARIABLE) or f"sqlite:///{storage.home() / 'mlflow.db'}"


@cache
def _client_for(uri: str) -> MlflowClient:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def client() -> MlflowClient:
    """Return the client of the tracking server in force, and point MLflow's own functions at the same."""
    uri = tracking_uri()
    made = _client_for(uri)
    if mlflow.get_tracking_uri() != uri:
        given = os.environ.get(_URI_VARIABLE)
        mlflow.set_tracking_uri(uri)
        if given is None:  # MLflow sets it by itself, and a later change of SFT_HOME would then be overruled
            os.environ.pop(_URI_VARIABLE, None)
    return made


def _experiment_id(name: str) -> str:
    found = client().get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != LifecycleStage.ACTIVE:
            raise ValueError(f"MLflow experiment {name!r} is deleted: restore it, or set another name in the config")
        return str(found.experiment_id)
    embedded = tracking_uri().startswith("sqlite:///")
    location = (storage.home() / "artifacts").as_uri() if embedded else None
    return str(client().create_experiment(name, artifact_location=location))


def create_parent_run(config: RunConfig, *, run_name: str, config_digest: str, tags: Mapping[str, str]) -> str:
    """Open the MLflow run of a pipeline run with its resolved config, and return its id."""
    run = client().create_run(
        _experiment_id(config.name),
        run_name=run_name,
        tags={CONFIG_TAG: config_digest, "sft.host": platform.node(), **tags},
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
    path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=CONFIG_FILE, tracking_uri=tracking_uri())
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


def get_run(run_id: str) -> Run:
    """Return a run; raise ValueError when the server knows none of this id."""
    try:
        return client().get_run(run_id)
    except mlflow.MlflowException as error:
        raise ValueError(f"MLflow run {run_id!r} is not known at {tracking_uri()}: {error.message}") from None


def reopen_run(run_id: str) -> None:
    """Set an interrupted run to RUNNING again."""
    client().update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))


def end_run(run_id: str, status: str) -> None:
    """End a run as FINISHED, FAILED or KILLED."""
    client().set_terminated(run_id, status=status)


def set_tags(run_id: str, tags: Mapping[str, Any]) -> None:
    """Set tags of a run, as text."""
    for name, value in tags.items():
        client().set_tag(run_id, name, str(value))


@contextmanager
def stage_run(parent_run_id: str, stage: str, *, system_metrics: bool = False) -> Iterator[str]:
    """Open the stage's child run, or reopen the one an interrupted attempt left, and end it rightly."""
    earlier = _find_stage_run(parent_run_id, stage)
    if earlier is not None:
        run_id = str(earlier.info.run_id)
        reopen_run(run_id)
    else:
        experiment = get_run(parent_run_id).info.experiment_id
        tags = {PARENT_TAG: parent_run_id, STAGE_TAG: stage}
        run_id = str(client().create_run(experiment, run_name=stage, tags=tags).info.run_id)
    monitor = SystemMetricsMonitor(run_id, resume_logging=earlier is not None) if system_metrics else None
    if monitor is not None:
        monitor.start()
    status = "KILLED"
    try:
        yield run_id
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        if monitor is not None:
            monitor.finish()
        end_run(run_id, status)


def remember(run_id: str, ref: Ref) -> None:
    """Keep the stage's result with its run, for `recall`."""
    client().set_tag(run_id, RESULT_TAG, ref.model_dump_json())


def recall(parent_run_id: str, stage: str, kind: type[R]) -> R | None:
    """Return the result of a stage that an interrupted pipeline run had finished, or None.

    A parent run has one config, one dataset and one base model (a resume with others is refused), so that a stage
    that finished under it need not run again.
    """
    run = _find_stage_run(parent_run_id, stage)
    if run is None or run.info.status != "FINISHED" or RESULT_TAG not in run.data.tags:
        return None
    return kind.model_validate_json(run.data.tags[RESULT_TAG])


def _find_stage_run(parent_run_id: str, stage: str) -> Run | None:
    found = client().search_runs(
        [get_run(parent_run_id).info.experiment_id],
        f"tags.`{PARENT_TAG}` = '{parent_run_id}' AND tags.`{STAGE_TAG}` = '{stage}'",
        max_results=1,
    )
    return found[0] if found else None


def log_metrics(run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Log metrics of one step; MLflow keeps NaN and infinity as they are."""
    now = int(time.time() * 1000)
    client().log_batch(run_id, metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()])


@contextmanager
def metric_log(run_id: str) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Give a function that takes (step, metrics) and sends them every two seconds and at the end.

    A curve of thousands of steps then costs a call every two seconds and not one a step.
    """
    waiting: list[Metric] = []
    sent = time.monotonic()

    def send() -> None:
        for start in range(0, len(waiting), _METRICS_A_CALL):
            client().log_batch(run_id, metrics=waiting[start : start + _METRICS_A_CALL])
        waiting.clear()

    def log(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal sent
        now = int(time.time() * 1000)
        waiting.extend(Metric(name, float(value), now, step) for name, value in metrics.items())
        if time.monotonic() - sent > _SEND_SECONDS:
            send()
            sent = time.monotonic()

    try:
        yield log
    finally:
        send()


def log_file(run_id: str, path: Path, artifact_path: str | None = None) -> None:
    """Upload one file."""
    client().log_artifact(run_id, str(path), artifact_path)


def log_folder(run_id: str, folder: Path, artifact_path: str | None = None) -> None:
    """Upload a folder's files."""
    client().log_artifacts(run_id, str(folder), artifact_path)


def log_table(run_id: str, frame: pl.DataFrame, artifact_file: str) -> None:
    """Log a table that MLflow's pages show and compare."""
    client().log_table(run_id, frame.to_dict(as_series=False), artifact_file)


def log_dataset(run_id: str, *, name: str, digest: str, source: str, profile: Mapping[str, Any], context: str) -> None:
    """Record a dataset as an input of a run, by our digest (MLflow's own hashes the first rows only)."""
    dataset = DatasetEntity(
        name=name,
        digest=digest[:36],
        source_type="local" if "://" not in source else urlparse(source).scheme,
        source=json.dumps({"uri": source}),
        profile=json.dumps(profile),
    )
    tag = InputTag(key="mlflow.data.context", value=context)
    client().log_inputs(run_id, [DatasetInput(dataset=dataset, tags=[tag])])


def training_curves(run_id: str) -> list[tuple[int, float, float | None]]:
    """Return (step, train loss, evaluation loss where there was one) of a training run."""
    evals = {metric.step: metric.value for metric in client().get_metric_history(run_id, "eval/loss")}
    train = client().get_metric_history(run_id, "train/loss")
    return [(metric.step, metric.value, evals.get(metric.step)) for metric in sorted(train, key=lambda m: m.step)]


def finish_parent(run_id: str, report: RunReport, dataset: DatasetRef, stages: Mapping[str, Ref]) -> None:
    """Log the report and the dataset on the parent run, and name the runs whose cached results it used."""
    client().log_dict(run_id, report.model_dump(mode="json"), "run_report.json")
    client().set_tag(run_id, MLFLOW_RUN_NOTE, _describe(report))
    log_dataset(
        run_id,
        name="dataset",
        digest=dataset.digest,
        source=dataset.uri,
        profile=report.dataset.model_dump(mode="json"),
        context="training",
    )
    for stage, ref in stages.items():
        owner = get_run(str(ref.mlflow_run_id)).data.tags.get(PARENT_TAG)
        if owner != run_id:
            client().set_tag(run_id, f"sft.reused.{stage}", ref.mlflow_run_id)


def _describe(report: RunReport) -> str:
    """Return the description that the run's page shows first."""
    entry = report.registry
    lines = [f"**{entry.name} version {entry.version}: {entry.verdict}**", ""]
    lines += [f"- {reason}" for reason in (*entry.reasons, *report.training.warnings)]
    lines += [
        "",
        "Artifacts: `report/report.html` compares base and fine-tuned model, `quality/quality.html` shows rows and "
        "masks, `side_by_side.json` has every held-out row.",
        f"Prefect flow run: `{report.prefect_flow_run_id}`",
    ]
    return "\n".join(lines)


def publish(folder: Path, run_id: str, artifact_path: str) -> tuple[str, str]:
    """Upload a finished folder to a run and move it into this machine's cache.

    Returns:
        The MLflow address and the digest.
    """
    digest = storage.digest_folder(folder)
    log_folder(run_id, folder, artifact_path)
    storage.keep_folder(folder, digest)
    return f"runs:/{run_id}/{artifact_path}", digest


def resolve(ref: Ref) -> Path:
    """Return a local folder that holds what the reference names: as is, from the cache, or downloaded.

    Raises:
        ArtifactError: it is gone, or its content is not what the digest says.
    """
    if "://" not in ref.uri and not ref.uri.startswith(("runs:/", "models:/")):
        return Path(ref.uri)
    if ref.uri.startswith("file://"):
        return Path(unquote(urlparse(ref.uri).path))
    if (folder := storage.cached_folder(ref.digest)) is not None:
        return folder
    with storage.new_folder() as target:
        try:
            local = mlflow.artifacts.download_artifacts(
                artifact_uri=ref.uri, dst_path=str(target), tracking_uri=tracking_uri()
            )
        except (mlflow.MlflowException, OSError) as error:
            raise ArtifactError(
                f"{ref.uri} cannot be fetched from {tracking_uri()} ({error}): if it was deleted, run with --no-cache"
            ) from error
        folder = Path(local) / MODEL_SUBFOLDER if ref.uri.startswith("models:/") else Path(local)
        found = storage.digest_folder(folder)
        if found != ref.digest:
            raise ArtifactError(
                f"{ref.uri} has digest {found[:12]}, not {ref.digest[:12]}: it was changed or cut short"
            )
        return storage.keep_folder(folder, ref.digest)


def ui_link(run_id: str) -> str | None:
    """Return the run's page on the tracking server, or None when tracking is a local database."""
    uri = tracking_uri()
    if not uri.startswith(("http://", "https://")):
        return None
    return f"{uri}/#/experiments/{get_run(run_id).info.experiment_id}/runs/{run_id}"
