"""Removes runs and logged models from MLflow for good: files and rows.

Clients of MLflow can mark as deleted only. Files and rows leave by `mlflow gc`, which deletes every experiment along
that somebody has marked; so the store that it uses is asked for one run or model at a time. MLflow promises none of it.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowException
from mlflow.entities import FileInfo, ViewType
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.tracking.dbmodels.models import SqlDataset, SqlInput, SqlInputTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy.exc import SQLAlchemyError

from tasks import storage
from tasks.tracking.connection import client, tracking_uri

PRUNED_TAG = "sft.pruned"
"""On runs that are being removed: a removal that was cut short is finished by the next."""
_SERVED = "mlflow-artifacts:"


class Remover:
    """Removes runs and models from a database and from where their artifacts are.

    Args:
        database: address of MLflow's own database, with the log-in if it has one.
    """

    def __init__(self, database: str) -> None:
        self._store = SqlAlchemyStore(database, (storage.home() / "artifacts").as_uri())

    def remove_run(self, run_id: str) -> None:
        """Remove a run: marked first, so that nobody takes from it what is about to go."""
        run = client().get_run(run_id)
        if run.info.lifecycle_stage == "active":
            client().set_tag(run_id, PRUNED_TAG, "yes")
            client().delete_run(run_id)
        delete_artifacts(run.info.artifact_uri)
        self._forget_inputs(run_id)
        self._store._hard_delete_run(run_id)

    def remove_model(self, model_id: str) -> None:
        """Remove a logged model."""
        location = self._store.get_logged_model(model_id, allow_deleted=True).artifact_location
        with suppress(Exception):  # marked before
            client().delete_logged_model(model_id)
        delete_artifacts(location)
        self._forget_inputs(model_id)
        self._store._hard_delete_logged_model(model_id)

    def _forget_inputs(self, owner: str) -> None:
        """Delete inputs and outputs of a run or model, and datasets that no other has, all of which MLflow leaves."""
        with self._store.ManagedSessionMaker(read_only=False) as session:
            theirs = (SqlInput.destination_id == owner) | (SqlInput.source_id == owner)
            inputs = session.query(SqlInput).filter(theirs).all()
            sources = {each.source_id for each in inputs}
            for each in inputs:
                session.query(SqlInputTag).filter(SqlInputTag.input_uuid == each.input_uuid).delete()
                session.delete(each)
            session.flush()
            used = {row[0] for row in session.query(SqlInput.source_id).filter(SqlInput.source_id.in_(sources))}
            session.query(SqlDataset).filter(SqlDataset.dataset_uuid.in_(sources - used)).delete()

    def close(self) -> None:
        """Let the database go."""
        self._store.engine.dispose()


def has_run(database: str, run_id: str) -> bool:
    """Tell whether this is the database that has a run."""
    try:
        store = SqlAlchemyStore(database, (storage.home() / "artifacts").as_uri())
    except (MlflowException, SQLAlchemyError):
        return False
    try:
        store.get_run(run_id)
        return True
    except MlflowException:
        return False
    finally:
        store.engine.dispose()


def find_unfinished() -> list[str]:
    """Return the runs whose removal was cut short."""
    experiments = [each.experiment_id for each in client().search_experiments()]
    if not experiments:
        return []
    found = client().search_runs(
        experiments, f"tags.`{PRUNED_TAG}` = 'yes'", run_view_type=ViewType.DELETED_ONLY, max_results=1000
    )
    return [str(run.info.run_id) for run in found]


def can_reach(location: str) -> bool:
    """Tell whether artifacts may be deleted from here.

    Those behind an MLflow server can be only through it. On this machine those of this home may be: a copied database
    still names the files of the home that it was copied from.
    """
    if (folder := _find_folder(location)) is not None:
        return folder.is_relative_to(storage.home())
    return not location.startswith(_SERVED) or tracking_uri().startswith(("http://", "https://"))


def delete_artifacts(location: str) -> None:
    """Delete a run's or a model's files; what is gone already is no error."""
    get_artifact_repository(location).delete_artifacts()
    if (folder := _find_folder(location)) is not None:
        with suppress(OSError):  # the folder of a run is around that of its artifacts
            folder.parent.rmdir()


def measure_artifacts(location: str) -> int:
    """Return the bytes of a run's or a model's files."""
    if (folder := _find_folder(location)) is not None:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(each.file_size or 0 for each in _list_files(location))


def _list_files(location: str) -> Iterator[FileInfo]:
    repository = get_artifact_repository(location)
    waiting: list[str | None] = [None]
    while waiting:
        for each in repository.list_artifacts(waiting.pop()):
            if each.is_dir:
                waiting.append(each.path)
            else:
                yield each


def _find_folder(location: str) -> Path | None:
    """Return the folder of artifacts that are on this machine."""
    parts = urlsplit(location)
    return Path(os.path.normpath(unquote(parts.path))) if parts.scheme == "file" else None
