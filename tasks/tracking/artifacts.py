"""Files, tables, datasets and folders of a run; folders travel by address and digest."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

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
    """An artifact is gone, or is not what its digest says."""


@tracking_time()
def log_file(run_id: str, path: Path, artifact_path: str | None = None) -> None:
    """Upload one file."""
    client().log_artifact(run_id, str(path), artifact_path)


@tracking_time()
def log_folder(run_id: str, folder: Path, artifact_path: str | None = None) -> None:
    """Upload a folder's files."""
    client().log_artifacts(run_id, str(folder), artifact_path)


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
