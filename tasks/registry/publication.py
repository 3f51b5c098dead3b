"""Published datasets: a run in MLflow a version, with the files as they were given, addressed datasets:/NAME/VERSION.

A version is its content: what was published before is not published again.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from schemas.artifacts import Published
from tasks import storage, tracking
from tasks.addresses import PUBLISHED
from tasks.registry import audit, lock

EXPERIMENT = "sft-datasets"
_NAME_TAG, _VERSION_TAG, _DIGEST_TAG = "sft.dataset_name", "sft.dataset_version", "sft.dataset_digest"
_FOLDER = "data"
_ADDRESS = re.compile(r"datasets:/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:/(?P<version>\d+))?")


class PublicationError(ValueError):
    """A dataset cannot be published, or is not published under this address."""


def make_name(source: str) -> str:
    """Return a dataset's name from its path: the last part without its ending."""
    path = Path(source.rstrip("/"))
    stem = path.name if path.is_dir() else path.name.split(".")[0]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")
    if not name:
        raise PublicationError(f"{source}: no name can be made of this: give one with --name")
    return name


def publish_files(
    name: str, files: Mapping[str, Path], facts: Mapping[str, Any], *, source: str, who: str
) -> Published:
    """Keep a dataset's files in MLflow as its next version, or return the version that has the same content.

    Args:
        name: of the dataset.
        files: path inside the dataset to the file.
        facts: what the check found, for people.
        source: where the files were.
        who: publishes.
    """
    if not _ADDRESS.fullmatch(PUBLISHED + name):
        raise PublicationError(
            f"--name {name!r}: letters, digits, '.', '_' and '-' are allowed, beginning with one of the first two"
        )
    with storage.new_folder() as folder:
        for place, file in files.items():
            target = folder / _FOLDER / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        digest = storage.digest_folder(folder / _FOLDER)
        with lock.hold(f"dataset.{name}", holder=who):
            versions = _find_versions(name)
            for version in versions:
                if version.data.tags[_DIGEST_TAG] == digest:
                    return _refer(version, is_new=False)
            number = 1 + max((int(version.data.tags[_VERSION_TAG]) for version in versions), default=0)
            return _keep(folder / _FOLDER, name, number, digest, facts, source=source, who=who)


def _keep(
    folder: Path, name: str, number: int, digest: str, facts: Mapping[str, Any], *, source: str, who: str
) -> Published:
    """Upload, and only then say that the version is there: an upload that was cut short is no version."""
    client = tracking.client()
    title = f"{name} version {number}"
    run = client.create_run(tracking.open_experiment(EXPERIMENT), run_name=title)
    run_id = str(run.info.run_id)
    status = "FAILED"
    try:
        client.log_dict(run_id, dict(facts), "check.json")
        tracking.log_dataset(
            run_id, name=name, digest=digest, source=source, profile=facts.get("rows", {}), context="published"
        )
        tracking.publish(folder, run_id, _FOLDER)
        rows = ", ".join(f"{what} {count:,}" for what, count in facts.get("rows", {}).items())
        tags = {
            "sft.published_by": who,
            "sft.published_at": audit.now(),
            "sft.source": source,
            MLFLOW_RUN_NOTE: f"**{title}**: {rows}\n\nUse it as `data.source: {PUBLISHED}{name}/{number}`.",
            _NAME_TAG: name,
            _DIGEST_TAG: digest,
            _VERSION_TAG: str(number),
        }
        tracking.set_tags(run_id, tags)
        status = "FINISHED"
    finally:
        tracking.end_run(run_id, status)
    return _refer(tracking.get_run(run_id), is_new=True)


def find_published(address: str) -> Published:
    """Return the version behind `datasets:/NAME/VERSION`, or the newest of `datasets:/NAME`.

    Raises:
        PublicationError: no such dataset or version.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise PublicationError(f"{address}: write datasets:/NAME or datasets:/NAME/VERSION")
    versions = _find_versions(match["name"])
    found = [version for version in versions if match["version"] in (None, version.data.tags[_VERSION_TAG])]
    if not found:
        known = ", ".join(version.data.tags[_VERSION_TAG] for version in versions)
        raise PublicationError(
            f"{address} is not published at {tracking.tracking_uri()}: "
            + (f"versions are {known}" if known else f"no version of {match['name']} is; sft publish makes one")
        )
    return _refer(found[-1], is_new=False)


def _find_versions(name: str) -> list[Run]:
    """Return the runs that hold the versions of a dataset, the oldest first."""
    runs = tracking.client().search_runs(
        [tracking.open_experiment(EXPERIMENT)], f"tags.`{_NAME_TAG}` = '{name}'", max_results=1000
    )
    whole = [run for run in runs if _VERSION_TAG in run.data.tags]
    return sorted(whole, key=lambda run: int(run.data.tags[_VERSION_TAG]))


def _refer(run: Run, *, is_new: bool) -> Published:
    tags, run_id = run.data.tags, str(run.info.run_id)
    return Published(
        uri=f"runs:/{run_id}/{_FOLDER}",
        digest=tags[_DIGEST_TAG],
        mlflow_run_id=run_id,
        name=tags[_NAME_TAG],
        version=tags[_VERSION_TAG],
        address=f"{PUBLISHED}{tags[_NAME_TAG]}/{tags[_VERSION_TAG]}",
        is_new=is_new,
    )
