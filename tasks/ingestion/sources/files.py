"""Finds the files of a dataset: which files of a folder hold rows, and their kinds (JSON, CSV, Parquet and so on)."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePath

from schemas.plurals import count_of
from tasks.allowed_roots import check_allowed
from tasks.ingestion.errors import DataError
from tasks.ingestion.rows.layouts import Reading
from tasks.ingestion.sources.remote_files import RemoteFile

KINDS: dict[str, str] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_MAX_SHOWN = 200
"""Characters of a path."""
# Lines in a stream that is read as it is; not divided.
STREAMS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSED = frozenset({".gz", ".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz"})
# What the datasets library writes beside its files, and LLaMA-Factory's index: descriptions, not rows.
METADATA_NAMES = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
HELD_OUT_NAMES = frozenset({"test", "eval", "valid", "validation", "val", "dev", "heldout", "held_out", "held-out"})
KNOWN = ", ".join(sorted(KINDS))


@dataclass(frozen=True)
class SourceFile:
    """A file of rows: where it is, what it is called in the tables, and how it is parsed."""

    path: Path
    """On this machine; of a remote file nothing is there, and its parts are brought elsewhere (remote.brought)."""
    name: str
    kind: str
    """One of KINDS, with the ending of a stream behind it where it is compressed: `jsonl.gz`."""
    remote: RemoteFile | None = None

    @property
    def shown(self) -> str:
        """What people know it by."""
        return str(self.path) if self.remote is None else self.remote.address

    @property
    def num_bytes(self) -> int:
        """Its size; 0 where a web server does not say it."""
        return self.path.stat().st_size if self.remote is None else self.remote.size or 0


@dataclass(frozen=True)
class Source:
    """The files of one dataset, in the order in which they are read."""

    label: str
    files: tuple[SourceFile, ...]
    warnings: tuple[str, ...] = ()
    reading: Reading | None = None
    """How rows become conversations, where an index of datasets says it and not the config."""
    num_samples: int | None = None
    """Take this many rows, chosen by the seed."""
    description: str = ""
    """What else decides what is read; goes into the digest."""


def kind_of_name(path: PurePath) -> str | None:
    """Return the kind that the file's endings tell (data.json.demo is JSON), or None."""
    kind = next((KINDS[suffix] for suffix in reversed([s.lower() for s in path.suffixes]) if suffix in KINDS), None)
    return f"{kind}{path.suffix.lower()}" if kind == "jsonl" and path.suffix.lower() in STREAMS else kind


def is_other_compressed(path: PurePath) -> bool:
    """Tell whether a file is compressed, and not as lines are read."""
    is_read = (kind_of_name(path) or "").endswith(tuple(STREAMS))
    return path.suffix.lower() in COMPRESSED and not is_read


def kind_of_file(path: Path) -> str:
    """Return the kind by the name, else by the first bytes.

    Raises:
        DataError: it is no regular file (reading a pipe or a device may never end), is compressed, or is of no known
            kind.
    """
    check_name(path)
    if not path.is_file():
        raise DataError(f"{path}: neither a file nor a folder (a pipe, socket or device): save its rows to a file")
    check_readable(path)
    if is_other_compressed(path):
        raise DataError(
            f"{path}: compressed files are not read, but for .jsonl.gz and .jsonl.zst: unpack it and give the {KNOWN} "
            "file inside"
        )
    kind = kind_of_name(path)
    if kind is not None:
        return kind
    with path.open("rb") as handle:
        head = handle.read(64)
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:6] == b"ARROW1":
        return "arrow"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
        return "json"
    raise DataError(f"{path}: neither its name nor its first bytes tell what it is: known endings are {KNOWN}")


def check_name(path: Path) -> None:
    """Refuse a name that is no text: tables and reports could not hold it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{str(path)!a}: the name is not UTF-8: rename it") from None


def exists(path: Path) -> bool:
    """Tell whether something is there.

    Raises:
        DataError: nobody can tell: the name is too long, links go in a circle, or a folder above may not be entered.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte is in no name
        return False
    except OSError as error:
        shown = str(path) if len(str(path)) <= _MAX_SHOWN else f"{str(path)[:_MAX_SHOWN]}…"
        raise DataError(f"{shown}: {error.strerror}: give a path that you may read") from None
    return True


def check_readable(path: Path) -> None:
    """Refuse what this user may not read, before rows are lost or hours are spent."""
    if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        raise DataError(f"{path}: you may not read it: change its mode or owner, or take it out of the dataset")


def find_in_folder(folder: Path) -> Source:
    """Take every file of a known kind below the folder, in the order of their relative paths."""
    check_readable(folder)
    files, skipped = [], []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_dir():
            check_readable(path)  # what is below would be missing without a word
            continue
        check_name(relative)
        kind = None if not path.is_file() or is_other_compressed(path) else kind_of_name(path)
        if kind is None or path.name in METADATA_NAMES:
            skipped.append(relative.as_posix())
        else:
            check_allowed(path, str(folder))  # it may be a link
            check_readable(path)
            files.append(SourceFile(path, relative.as_posix(), kind))
    if not files:
        raise DataError(f"{folder}: the folder holds no dataset file: known endings are {KNOWN}")
    return Source(str(folder), tuple(files), warn_of_folder(files, skipped))


def warn_of_folder(files: list[SourceFile], skipped: list[str]) -> tuple[str, ...]:
    """Say which files were not read, and which look like held-out data among training data."""
    warnings = []
    if skipped:
        shown = ", ".join(skipped[:10]) + (", …" if len(skipped) > 10 else "")
        warnings.append(f"no rows, and not read: {count_of(len(skipped), 'file')} of the folder: {shown}")
    held_out = [file.name for file in files if _names_held_out(file.name)]
    if held_out and len(held_out) < len(files):
        warnings.append(
            f"{', '.join(held_out[:10])}: named like held-out data, but read with the rest of the folder; "
            "give it as data.eval_source, and the training files as data.source, to keep it apart"
        )
    return tuple(warnings)


def _names_held_out(name: str) -> bool:
    """Tell whether a folder or the start of the file's name is a usual name of a held-out split."""
    path = Path(name.lower())
    parts = [*path.parts[:-1], path.name.split(".")[0], path.name.split(".")[0].split("-")[0]]
    return any(part in HELD_OUT_NAMES for part in parts)


def looks_like_a_path(source: str) -> bool:
    """Tell a missing file from a hub name (`name` or `org/name`)."""
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    return (
        "\\" in source
        or source.startswith((".", "~", "/"))
        or source.endswith("/")
        or source.count("/") > 1
        or any(suffix in KINDS or suffix in COMPRESSED for suffix in suffixes)
    )
