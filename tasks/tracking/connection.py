"""The tracking server that is used: its address, its client, and the address of a run's page."""

import logging
import os
from functools import cache

import mlflow
from mlflow.entities import LifecycleStage, Run
from mlflow.tracking import MlflowClient

from tasks import storage
from tasks.sqlite_files import find_path, make_address
from tasks.stored_files import is_store

_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_ARTIFACTS_VARIABLE = "SFT_ARTIFACTS"
_LOCAL_SERVER = "http://127.0.0.1:5000"  # of `mlflow ui`


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or the SQLite file under SFT_HOME."""
    return os.environ.get(_URI_VARIABLE) or make_address(storage.home() / "mlflow.db")


def artifact_root() -> str | None:
    """Return SFT_ARTIFACTS, the address at which artifacts are kept, if it is one of an object store."""
    address = os.environ.get(_ARTIFACTS_VARIABLE, "").rstrip("/")
    return address if is_store(address) else None


@cache
def _client_for(uri: str) -> MlflowClient:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints the trace of what it raises too
    if (file := find_path(uri)) is not None:
        # It loads MLflow's store, which clients of a server do without.
        from tasks.tracking.database import prepare_database

        prepare_database(file, artifact_root=str(storage.home() / "artifacts"))
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


def get_run(run_id: str) -> Run:
    """Return a run; raise ValueError when the server knows none of this id."""
    try:
        return client().get_run(run_id)
    except mlflow.MlflowException as error:
        raise ValueError(f"MLflow run {run_id!r} is not known at {tracking_uri()}: {error.message}") from None


def has_records() -> bool:
    """Tell whether there can be a run: a local database that is not there has none, and is not made to be asked."""
    file = find_path(tracking_uri())
    return file is None or file.is_file()


def find_status(run_id: str) -> str | None:
    """Return a run's status, or None where MLflow answers that it knows none of this id."""
    try:
        return str(client().get_run(run_id).info.status)
    except mlflow.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def is_deleted(run_id: str) -> bool:
    """Tell whether MLflow knows no run of this id any more, or has it marked as deleted."""
    try:
        return client().get_run(run_id).info.lifecycle_stage != LifecycleStage.ACTIVE
    except mlflow.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return True
        raise


def experiment_of(run_id: str) -> str:
    """Return a run's experiment, asked for once: it never changes."""
    return _experiment_at(run_id, tracking_uri())


@cache
def _experiment_at(run_id: str, uri: str) -> str:
    return str(get_run(run_id).info.experiment_id)


def ui_link(run_id: str) -> str | None:
    """Return the run's page on the tracking server, or None when tracking is a local database."""
    if _page("") is None:
        return None
    return _page(f"experiments/{experiment_of(run_id)}/runs/{run_id}")


def experiment_link(experiment_id: str) -> str | None:
    """Return an experiment's page on the tracking server, or None when tracking is a local database."""
    return _page(f"experiments/{experiment_id}")


def version_link(name: str, version: str) -> str | None:
    """Return a model version's page on the tracking server, or None when tracking is a local database."""
    return _page(f"models/{name}/versions/{version}")


def local_link(run_id: str) -> str:
    """Return the run's page where `mlflow ui` shows a local database."""
    return _make_link(_LOCAL_SERVER, f"experiments/{experiment_of(run_id)}/runs/{run_id}")


def _page(place: str) -> str | None:
    uri = tracking_uri()
    return _make_link(uri, place) if uri.startswith(("http://", "https://")) else None


def _make_link(server: str, place: str) -> str:
    """Return the address of a page.

    MLflow's pages go by this argument, or else by what the browser saw last; at first that is traces, whatever kind the
    experiment has.
    """
    return f"{server.rstrip('/')}/#/{place}?workflowType=machine_learning"
