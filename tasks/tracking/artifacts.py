"""Files, tables, datasets and folders of a run; folders travel by address and digest."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import polars as pl
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag

from schemas.artifacts import Ref
from tasks import storage
from tasks.tracking.connection import client, tracking_uri
from tasks.tracking.stopwatch import tracking_time

MODEL_SUBFOLDER = "artifacts/model"  # where a logged model keeps the folder it was logged from


class ArtifactError(ValueError):
    """A folder is gone, or is not what its digest says."""


@tracking_time()
def log_file(run_id: str, path: Path, artifact_path: str | None = None) -> None:
    """Upload one file."""
    client().log_artifact(run_id, str(path), artifact_path)


@tracking_time()
def log_text(run_id: str, text: str, artifact_file: str) -> None:
    """Write a text file that MLflow's pages show."""
    client().log_text(run_id, text, artifact_file)


@tracking_time()
def log_folder(run_id: str, folder: Path, artifact_path: str | None = None) -> None:
    """Upload a folder's files."""
    client().log_artifacts(run_id, str(folder), artifact_path)


@tracking_time()
def list_files(run_id: str, folder: str) -> list[str]:
    """Return the paths of what lies in a folder of a run's artifacts."""
    return [item.path for item in client().list_artifacts(run_id, folder)]


@tracking_time()
def log_table(run_id: str, frame: pl.DataFrame, artifact_file: str) -> None:
    """Log a table that MLflow's pages show and compare."""
    client().log_table(run_id, frame.to_dict(as_series=False), artifact_file)


@tracking_time()
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


@tracking_time()
def publish(folder: Path, run_id: str, artifact_path: str) -> tuple[str, str]:
    """Upload a finished folder to a run and move it into this machine's cache.

    Returns:
        The MLflow address and the digest.
    """
    digest = storage.digest_folder(folder)
    log_folder(run_id, folder, artifact_path)
    storage.keep_folder(folder, digest)
    return f"runs:/{run_id}/{artifact_path}", digest


@tracking_time()
def resolve(ref: Ref) -> Path:
    """Return a local folder that holds what the reference names: as is, from the cache, or downloaded.

    Its content is compared with the digest wherever it lies (see storage.digest_folder for what that costs).

    Raises:
        ArtifactError: it is gone, or its content is not what the digest says.
    """
    if "://" not in ref.uri and not ref.uri.startswith(("runs:/", "models:/")):
        return _compare(Path(ref.uri), ref)
    if (folder := storage.cached_folder(ref.digest)) is not None:
        return folder
    if ref.uri.startswith("file://"):
        raise ArtifactError(f"{ref.uri} is gone from the cache: start the run again, which makes it again")
    with storage.new_folder() as target:
        try:
            local = mlflow.artifacts.download_artifacts(
                artifact_uri=ref.uri, dst_path=str(target), tracking_uri=tracking_uri()
            )
        except (mlflow.MlflowException, OSError) as error:
            raise ArtifactError(
                f"{ref.uri} cannot be fetched from {tracking_uri()} ({error}): if it was deleted, start the run again, "
                "which makes it again"
            ) from error
        folder = Path(local) / MODEL_SUBFOLDER if ref.uri.startswith("models:/") else Path(local)
        found = storage.digest_folder(folder)
        if found != ref.digest:
            raise ArtifactError(
                f"{ref.uri} has digest {found[:12]}, not {ref.digest[:12]}: it was changed or cut short: start the run "
                "again, which makes it again"
            )
        return storage.keep_folder(folder, ref.digest)


def _compare(folder: Path, ref: Ref) -> Path:
    """Return a folder that the user brought, if it is what it was when the run began.

    Raises:
        ArtifactError: it is gone or was changed since.
    """
    try:
        found = storage.digest_folder(folder)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read ({error})") from error
    if found != ref.digest:
        raise ArtifactError(
            f"{folder} was changed while the run was using it (digest {ref.digest[:12]} before, {found[:12]} now): "
            "bring the old files back, or start a new run"
        )
    return folder
