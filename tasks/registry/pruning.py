"""Old runs leave MLflow with all that belongs to them, one after the other, each looked at once more before it goes."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from mlflow import MlflowException

from tasks import storage, tracking
from tasks.registry.retention import RESUMABLE, OldRun
from tasks.registry.versions import RUN_TAG, get_version
from tasks.tracking import removal

logger = logging.getLogger(__name__)


def prune_runs(
    old: Sequence[OldRun], database: str | None, *, on_progress: Callable[[int], None] = lambda _: None
) -> int:
    """Remove runs from MLflow, or mark them as deleted where its database cannot be reached, and return how many.

    Args:
        old: of `find_old_runs`.
        database: address of MLflow's own database; None marks only, and files and rows go with `mlflow gc` there.
        on_progress: is told how many are done.
    """
    remover = removal.Remover(database) if database is not None else None
    num_done = 0
    try:
        if remover is not None:
            for run_id in removal.find_unfinished():
                remover.remove_run(run_id)
        for run in old:
            if _has_changed(run):
                logger.warning("Run %s (%s) stays: it is used again", run.run_id, run.name)
                continue
            if _delete_versions(run, remover):
                _prune(run, remover)
                num_done += 1
                on_progress(num_done)
        if remover is not None:
            remover.forget_versions(RUN_TAG)
    finally:
        if remover is not None:
            remover.close()
    return num_done


def _has_changed(run: OldRun) -> bool:
    """Tell whether a run is worked on, or one of its versions got an alias, since it was looked at."""
    if run.run_id in run.runs and storage.is_held(run.run_id):
        return True
    try:
        status = tracking.get_run(run.run_id).info.status
        aliases = [alias for name, number in run.versions for alias in get_version(name, number).aliases]
    except ValueError:
        return False  # somebody else was faster
    return bool(aliases) or (status in RESUMABLE and storage.is_held(run.run_id))


def _delete_versions(run: OldRun, remover: removal.Remover | None) -> bool:
    """Delete the versions of a run; tell whether all are gone, so that the run may go."""
    client = tracking.client()
    for name, number in run.versions:
        try:
            tags = get_version(name, number).tags if remover is None else {}  # MLflow keeps them; a remover does not
            for tag in set(tags) - {RUN_TAG}:
                client.delete_model_version_tag(name, number, tag)
            client.delete_model_version(name, number)
        except ValueError:
            continue  # somebody else was faster
        except MlflowException as error:
            logger.warning("Run %s stays: %s version %s cannot be deleted: %s", run.run_id, name, number, error)
            return False
    return True


def _prune(run: OldRun, remover: removal.Remover | None) -> None:
    for run_id in run.runs:
        if remover is not None:
            remover.remove_run(run_id)
        else:
            _mark(run_id)
    if remover is None:
        for model_id in run.models:
            with suppress(MlflowException):  # somebody else was faster
                tracking.client().delete_logged_model(model_id)


def _mark(run_id: str) -> None:
    with suppress(ValueError):  # somebody else was faster
        removal.mark_run(tracking.get_run(run_id))
