"""Where a dataset's rows are: a file, a folder, an address, LLaMA-Factory's index of datasets, or one of the hub."""

import hashlib
from pathlib import Path

from schemas.config import PREFERENCE, DataConfig, DatasetConfig
from tasks.addresses import is_address
from tasks.allowed_roots import check_allowed
from tasks.ingestion.errors import DataError
from tasks.ingestion.sources.files import Source, SourceFile, exists, find_in_folder, kind_of_file, looks_like_a_path
from tasks.ingestion.sources.hub import find_on_hub
from tasks.ingestion.sources.llamafactory import read_index, split_index_name
from tasks.ingestion.sources.remote import find_at_address
from tasks.storage import digest_file

_SETTINGS = "data.source, data.eval_source or data.mixture"


def digest_source(config: DataConfig) -> str:
    """Return the sha256 (hex) over names and contents of all files, further and held-out datasets included.

    Names are relative to the dataset, so that a moved dataset keeps its digest. Contents are streamed; those of remote
    files are not read: what their stores say of their versions stands for them.
    """
    whole = hashlib.sha256()
    for role, dataset in (*(("train", dataset) for dataset in config.datasets), ("eval", config.held_out_dataset)):
        for source in find_sources(dataset) if dataset is not None else ():
            whole.update(f"{role}\0{source.description}\n".encode())
            for file in source.files:
                whole.update(f"{file.name}\0{_digest(file)}\n".encode())
    return whole.hexdigest()


def _digest(file: SourceFile) -> str:
    return digest_file(file.path) if file.remote is None else file.remote.version


def check_unchanged(config: DataConfig, digest: str) -> None:
    """Compare the files with the digest that they had before they were read; files with the same stamps are not read.

    Raises:
        DataError: they were changed meanwhile, so that nobody knows which rows were read.
    """
    found = digest_source(config)
    if found != digest:
        raise DataError(
            f"{config.source}: the files were changed while they were read (digest {digest[:12]} before, {found[:12]} "
            "now): start again when nobody writes to them"
        )


def find_sources(dataset: DatasetConfig) -> tuple[Source, ...]:
    """Resolve a dataset: an index of datasets gives one source for each it names, everything else gives one.

    Raises:
        DataError: the path is missing, holds no rows, or neither folder nor hub knows the name.
        OutsideRootsError: the path is none that the service reads.
    """
    name = dataset.source
    if is_address(name):
        return (find_at_address(name, _SETTINGS),)
    try:
        Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{name}: {error}: write the whole path") from None
    index, chosen = split_index_name(name)
    path = Path(name).expanduser()
    if index is not None:
        check_allowed(index, _SETTINGS)
        return read_index(index, chosen, pairs=dataset.format == PREFERENCE)
    if looks_like_a_path(name):
        check_allowed(path, _SETTINGS)  # first, so that nobody learns what is there
    is_there = exists(path)
    if is_there:
        check_allowed(path, _SETTINGS)
    if path.is_dir():
        return (find_in_folder(path),)
    if is_there:
        return (Source(name, (SourceFile(path, path.name, kind_of_file(path)),)),)
    if looks_like_a_path(name):
        raise DataError(
            f"{name}: no such file or folder (looked in {Path.cwd()}): correct {_SETTINGS}; "
            "a hub dataset is written org/name"
        )
    return (find_on_hub(name, dataset.subset, dataset.split, dataset.revision),)
