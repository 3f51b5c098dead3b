"""Datasets of the Hugging Face hub, by name; no code of a dataset is run."""

import re
from pathlib import Path

from tasks.ingestion.errors import DataError
from tasks.ingestion.sources.files import Source, SourceFile

COMMIT = re.compile("[0-9a-f]{40}")


def find_on_hub(
    name: str, subset: str | None, split: str, revision: str | None, *, data_folder: str | None = None
) -> Source:
    """Download a split of a hub dataset; its rows then lie as Arrow files in the hub cache.

    The datasets library runs no code of a dataset (loading scripts are gone from it).

    Args:
        name: `org/name`, or a name alone.
        subset: configuration name of the dataset, or its default.
        split: such as train; no slices.
        revision: commit, tag or branch, or the newest.
        data_folder: folder inside the dataset's repository.

    Raises:
        DataError: the hub cannot be reached, or does not know one of these.
    """
    if "[" in split:
        raise DataError(f"data.split = {split!r}: slices are not read: name a split and use data.max_rows")
    import datasets  # a second of import that local files need not pay

    try:
        table = datasets.load_dataset(name, subset, data_dir=data_folder, split=split, revision=revision)
    except Exception as error:
        raise DataError(
            f"{name}: neither a file or folder (looked in {Path.cwd()}) nor a readable dataset of the hub "
            f"(subset {subset or 'default'}, split {split}, revision {revision or 'main'}): "
            f"{type(error).__name__}: {error}. Correct the name, data.subset, data.split or data.revision, "
            "or give a local file"
        ) from error
    paths = [Path(entry["filename"]) for entry in table.cache_files]
    assert paths, f"{name}: the hub library left no files"
    _check_commit(name, revision, paths)
    return Source(name, tuple(SourceFile(path, f"{name}/{path.name}", "arrow") for path in paths))


def _check_commit(name: str, revision: str | None, paths: list[Path]) -> None:
    """Refuse another commit than the pinned one: without a network, the library gives what its cache has.

    The cache keeps a dataset's files in a folder named by the commit.
    """
    if revision is None or not COMMIT.fullmatch(revision):
        return
    other = {path.parent.name for path in paths} - {revision}
    if other:
        raise DataError(
            f"{name}: the hub cache has commit {', '.join(sorted(other))} and data.revision is {revision}, which "
            "could not be fetched: connect to the hub, or correct data.revision"
        )
