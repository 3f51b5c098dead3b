"""Removes runs and logged models from MLflow for good: files and rows.

Clients of MLflow can mark as deleted only. Files and rows leave by `mlflow gc`, which deletes every experiment along
that somebody has marked; so the store that it uses is asked for one run or model at a time. MLflow promises none of it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowException
from mlflow.entities import FileInfo, LifecycleStage, Run, ViewType
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion as _Version
from mlflow.store.model_registry.dbmodels.models import SqlModelVersionTag
from mlflow.store.tracking.dbmodels.models import SqlDataset, SqlInput, SqlInputTag, SqlLoggedModel
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import func
from sqlalchemy.exc import SQLAlchemyError

from tasks import storage
from tasks.tracking.calls import read_pages
from tasks.tracking.connection import client, is_deleted, tracking_uri

PRUNED_TAG = "sft.pruned"
"""On runs that are being removed: a removal that was cut short is finished by the next."""
_SERVED, _ARTIFACTS = "mlflow-artifacts:", "/artifacts"
_PAGE = 1000


class Remover:
    """Removes runs and models from a database and from where their artifacts are.

    Args:
        database: address of MLflow's own database, with the log-in if it has one.
    """

    def __init__(self, database: str) -> None:
        self._store = SqlAlchemyStore(database, (storage.home() / "artifacts").as_uri())

    def remove_run(self, run_id: str) -> None:
        """Remove a run and the models that it logged: marked first, so that nobody takes what is about to go."""
        with _ignore_gone():
            run = client().get_run(run_id)
            mark_run(run)
            with self._store.ManagedSessionMaker() as session:  # a server's clients are told of no marked ones
                models = session.query(SqlLoggedModel.model_id).filter(SqlLoggedModel.source_run_id == run_id)
                found = [str(model_id) for (model_id,) in models]
            for model_id in found:
                self._remove_model(model_id)
            delete_artifacts(run.info.artifact_uri)
            self._forget_inputs(run_id)
            self._store._hard_delete_run(run_id)

    def _remove_model(self, model_id: str) -> None:
        with _ignore_gone():
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

    def forget_versions(self, tag: str) -> None:
        """Delete the rows that MLflow keeps of deleted versions, in registered models that have versions with a tag.

        That of the highest number stays, with this tag alone: MLflow numbers the next version after it, and gives no
        number twice.
        """
        tags = SqlModelVersionTag
        with self._store.ManagedSessionMaker(read_only=False) as session:
            for (name,) in session.query(tags.name).filter(tags.key == tag).distinct().all():
                of_model, deleted = _Version.name == name, _Version.current_stage == STAGE_DELETED_INTERNAL
                highest = session.query(func.max(_Version.version)).filter(of_model).scalar()
                for row in session.query(_Version).filter(of_model, deleted):
                    gone = (
                        [row] if row.version < highest else [each for each in row.model_version_tags if each.key != tag]
                    )
                    for each in gone:
                        session.delete(each)

    def close(self) -> None:
        """Let the database go."""
        self._store.engine.dispose()


def mark_run(run: Run) -> None:
    """Mark a run as deleted, so that it is found again by `find_unfinished`, whoever removes it then."""
    if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
        return
    try:
        client().set_tag(run.info.run_id, PRUNED_TAG, "yes")
        client().delete_run(run.info.run_id)
    except MlflowException:
        if not is_deleted(run.info.run_id):  # otherwise somebody else was faster
            raise


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


@contextmanager
def _ignore_gone() -> Iterator[None]:
    """Let a run or model be gone already: somebody else was faster."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def find_unfinished() -> list[str]:
    """Return the runs whose removal was cut short, or that were marked from where the database is out of reach.

    Those whose artifacts may not be deleted from here are not among them.
    """
    found = read_pages(client().search_experiments)
    experiments = [each.experiment_id for each in found]
    if not experiments:
        return []
    query, which = f"tags.`{PRUNED_TAG}` = 'yes'", ViewType.DELETED_ONLY
    runs = read_pages(
        client().search_runs, experiment_ids=experiments, filter_string=query, run_view_type=which, max_results=_PAGE
    )
    return [str(run.info.run_id) for run in runs if can_reach(run.info.artifact_uri)]


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
    if (folder := _find_folder(location)) is None:
        get_artifact_repository(_around(location)).delete_artifacts()
        return
    while folder.exists():
        with suppress(FileNotFoundError):  # another process deletes it too
            shutil.rmtree(folder)
    with suppress(OSError):
        folder.parent.rmdir()


def _around(location: str) -> str:
    """Return the folder of a run or model, which holds nothing but that of its artifacts."""
    return location.removesuffix(_ARTIFACTS)


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
