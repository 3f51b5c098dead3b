"""Files, tables, datasets and folders of a run; folders travel by address and digest."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import polars as pl
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag

from schemas.artifacts import Ref
from tasks import storage, stored_files
from tasks.partitions import list_parts
from tasks.tracking.connection import artifact_root, client, tracking_uri
from tasks.tracking.stopwatch import tracking_time

MODEL_SUBFOLDER = "artifacts/model"  # where a logged model keeps the folder it was logged from
_SERVED = "mlflow-artifacts:"
_NUM_THREADS = 8


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

    Raises:
        ArtifactError: the tracking server does not find what workers have put into the store.
    """
    digest = storage.digest_folder(folder)
    log_folder(run_id, folder, artifact_path)
    is_apart = bool(stored_files.find_absent(folder))
    storage.keep_folder(folder, digest)
    ref = Ref(uri=f"runs:/{run_id}/{artifact_path}", digest=digest, mlflow_run_id=run_id)
    if is_apart:
        check(ref)
    return ref.uri, digest


@tracking_time()
def resolve(ref: Ref) -> Path:
    """Return a local folder that holds what the reference names: as is, from the cache, or downloaded.

    Its content is compared with the digest wherever it lies (see storage.digest_folder for what that costs).

    Raises:
        ArtifactError: it is gone, or its content is not what the digest says.
    """
    folder = _find_folder(ref)
    _fetch_absent(ref, folder, stored_files.find_absent(folder))
    return folder


@tracking_time()
def resolve_some(ref: Ref, *names: str) -> Path:
    """As `resolve`, without the files that workers have put into the store, but for some.

    Args:
        ref: of a folder.
        names: files, or tables that are folders, that have to be there; where the whole was never apart, all of it is.
    """
    folder = _find_folder(ref)
    _fetch_absent(ref, folder, stored_files.find_absent(folder, names))
    return folder


@tracking_time()
def check(ref: Ref) -> None:
    """Look whether what a reference names is there: files here by their contents, those in a store by their sizes.

    Raises:
        ArtifactError: something is gone or damaged.
    """
    folder = _find_folder(ref)
    absent = stored_files.find_absent(folder)
    if not absent:
        return
    listed = stored_files.read_list(folder)
    for place in sorted({name.rpartition("/")[0] for name in absent}):
        try:
            found = _list_sizes(f"{ref.uri}/{place}".rstrip("/"))
        except (mlflow.MlflowException, OSError) as error:
            raise ArtifactError(f"{ref.uri} cannot be listed at {tracking_uri()} ({error})") from error
        for name in (name for name in absent if name.rpartition("/")[0] == place):
            if found.get(name.rpartition("/")[2]) != listed[name].num_bytes:
                raise ArtifactError(f"{ref.uri}/{name} is gone or damaged: start the run again, which makes it again")


def read_parts(ref: Ref, table: str, first: Sequence[int] = ()) -> Iterator[Path]:
    """Give the files of a table one after the other; one that is in a store is fetched for that time only.

    Args:
        ref: of a folder.
        table: its name there.
        first: numbers of those that come before the others.

    Raises:
        ArtifactError: one is gone or damaged.
    """
    folder = _find_folder(ref)
    absent = stored_files.find_absent(folder, [table])
    if not absent:
        parts = list_parts(folder / table)
        yield from (parts[number] for number in _put_first(len(parts), first))
        return
    listed = stored_files.read_list(folder)
    names = sorted(name for name in listed if name == table or name.startswith(f"{table}/"))
    for name in (names[number] for number in _put_first(len(names), first)):
        if (folder / name).is_file():
            yield folder / name
            continue
        with storage.new_folder() as place:
            yield _fetch(ref, name, listed[name], place)


def count_parts(ref: Ref, table: str) -> int:
    """Return of how many files a table is, here or in a store."""
    folder = _find_folder(ref)
    if not stored_files.find_absent(folder, [table]):
        return len(list_parts(folder / table))
    return sum(name == table or name.startswith(f"{table}/") for name in stored_files.read_list(folder))


def find_address(ref: Ref) -> str | None:
    """Return the address of a folder of a run's artifacts, where workers can read files themselves; else None."""
    if not ref.uri.startswith("runs:/"):
        return None
    run_id, _, artifact_path = ref.uri.removeprefix("runs:/").partition("/")
    return find_store(run_id, artifact_path)


@tracking_time()
def find_store(run_id: str, artifact_path: str) -> str | None:
    """Return the address of a folder of a run's artifacts, where workers can put files themselves; else None.

    Where the server hands artifacts on (mlflow-artifacts:/), it is below SFT_ARTIFACTS, which has to be what the server
    has; where they are in a folder, there is none.
    """
    address = client().get_run(run_id).info.artifact_uri.rstrip("/")
    if address.startswith(_SERVED):
        address = f"{artifact_root() or ''}{urlparse(address).path}"
    return f"{address}/{artifact_path}" if stored_files.is_store(address) else None


def _put_first(count: int, first: Sequence[int]) -> list[int]:
    """Return the numbers below a count, some of them first."""
    return list(dict.fromkeys([*(number for number in first if number < count), *range(count)]))


def _find_folder(ref: Ref) -> Path:
    """Return the local folder of a reference, which may lack files that are in a store."""
    if "://" not in ref.uri and not ref.uri.startswith(("runs:/", "models:/")):
        return _compare(Path(ref.uri), ref)
    if (folder := storage.cached_folder(ref.digest)) is not None:
        return folder
    if ref.uri.startswith("file://"):
        raise ArtifactError(f"{ref.uri} is gone from the cache: start the run again, which makes it again")
    with storage.new_folder() as target:
        try:
            local = _download(ref.uri, target)
        except (mlflow.MlflowException, OSError, stored_files.LostError) as error:
            raise ArtifactError(
                f"{ref.uri} cannot be fetched from {tracking_uri()} ({error}): if it was deleted, start the run again, "
                "which makes it again"
            ) from error
        folder = local / MODEL_SUBFOLDER if ref.uri.startswith("models:/") else local
        found = storage.digest_folder(folder)
        if found != ref.digest:
            raise ArtifactError(
                f"{ref.uri} has digest {found[:12]}, not {ref.digest[:12]}: it was changed or cut short: start the run "
                "again, which makes it again"
            )
        return storage.keep_folder(folder, ref.digest)


def _download(uri: str, target: Path) -> Path:
    """Download a folder, but for the files that its list of stored ones names."""
    sizes = _list_sizes(uri) if uri.startswith("runs:/") else {}
    if stored_files.LIST_NAME not in sizes:
        return Path(_download_artifact(uri, target))
    folder = target / uri.rpartition("/")[2]
    folder.mkdir()
    _download_artifact(f"{uri}/{stored_files.LIST_NAME}", folder)
    listed = {name.partition("/")[0] for name in stored_files.read_list(folder)}
    for name in sizes.keys() - listed - {stored_files.LIST_NAME}:
        _download_artifact(f"{uri}/{name}", folder)
    return folder


def _download_artifact(uri: str, target: Path) -> str:
    found: str = mlflow.artifacts.download_artifacts(
        artifact_uri=uri, dst_path=str(target), tracking_uri=tracking_uri()
    )
    return found


def _list_sizes(uri: str) -> dict[str, int | None]:
    """Return what is directly in a folder of artifacts, with the sizes of files."""
    found = mlflow.artifacts.list_artifacts(artifact_uri=uri, tracking_uri=tracking_uri())
    return {item.path.rpartition("/")[2]: item.file_size for item in found}


def _fetch_absent(ref: Ref, folder: Path, names: Sequence[str]) -> None:
    """Fetch files that are in the store only into the folder of the cache."""
    listed = stored_files.read_list(folder)

    def fetch(name: str) -> None:
        with storage.new_folder() as place:
            found = _fetch(ref, name, listed[name], place)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            found.replace(folder / name)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        list(pool.map(fetch, names))


def _fetch(ref: Ref, name: str, wanted: stored_files.StoredFile, place: Path) -> Path:
    """Fetch a file that is in the store.

    Raises:
        ArtifactError: it is gone, or another one.
    """
    try:
        found = Path(_download_artifact(f"{ref.uri}/{name}", place))
    except (mlflow.MlflowException, OSError) as error:
        raise ArtifactError(
            f"{ref.uri}/{name} cannot be fetched from {tracking_uri()} ({error}): if it was deleted, start the run "
            "again, which makes it again"
        ) from error
    if found.stat().st_size != wanted.num_bytes or storage.digest_file(found) != wanted.sha256:
        raise ArtifactError(
            f"{ref.uri}/{name} is not the file that was put there: start the run again, which makes it again"
        )
    return found


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
