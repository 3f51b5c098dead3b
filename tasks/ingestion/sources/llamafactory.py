"""LLaMA-Factory's index of datasets (dataset_info.json) as a source.

An entry is chosen by its name behind a #, as in `data/dataset_info.json#identity,alpaca_zh_demo`. Semantics follow
LLaMA-Factory 0.9: where an entry has no `columns` (or `tags`), all have their defaults; where it has, those not listed
are not read. Two things differ, and are reported: rows are kept that LLaMA-Factory drops without a word, and
`num_samples` beyond the number of rows makes no copies (a copy could stand on both sides of the split).
"""

import json
from pathlib import Path
from types import NoneType
from typing import Any

from schemas.config import PREFERENCE
from tasks.allowed_roots import check_allowed
from tasks.ingestion.errors import DataError
from tasks.ingestion.rows.layouts import Reading
from tasks.ingestion.rows.messages import DEFAULT_TAGS, FUNCTION_CALL, ROLES, Tags
from tasks.ingestion.sources.files import Source, SourceFile, find_in_folder, kind_of_file
from tasks.ingestion.sources.hub import find_on_hub

INDEX_NAME = "dataset_info.json"
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
# Their name of a column: our name of the field.
ALPACA_FIELDS = {**ALPACA_COLUMNS, "history": "history", "system": "system", "tools": "tools"}
SHAREGPT_FIELDS = {"messages": "conversations", "system": "system", "tools": "tools"}
RANKING_FIELDS = {
    "prompt": "prompt",
    "messages": "prompt",
    "query": "input",
    "chosen": "chosen",
    "rejected": "rejected",
    "history": "history",
    "system": "system",
    "tools": "tools",
}
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": FUNCTION_CALL,
    "system_tag": "system",
}
MEDIA = ("images", "videos", "audios")


def split_index_name(name: str) -> tuple[Path | None, list[str]]:
    """Split `…/dataset_info.json#a,b` into the index and the names; (None, []) for every other source."""
    path, _, names = name.partition("#")
    if Path(path).name != INDEX_NAME:
        return None, []
    return Path(path).expanduser(), [part.strip() for part in names.split(",") if part.strip()]


def read_index(path: Path, names: list[str], *, pairs: bool = False) -> tuple[Source, ...]:
    """Return a source for each entry that is named; names may be left out where there is one entry.

    Args:
        path: of the index.
        names: of its entries.
        pairs: whether pairs of answers are wanted (`ranking`), and not single ones.

    Raises:
        DataError: no such index or entry, or an entry that is not for what is wanted, or not for text.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        index = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable index of datasets ({error})") from error
    if not isinstance(index, dict) or not all(isinstance(entry, dict) for entry in index.values()):
        raise DataError(
            f"{path}: not LLaMA-Factory's index (names with their entries): "
            "for a dataset that the datasets library saved, give its folder"
        )
    if not names and len(index) == 1:
        names = list(index)
    unknown = [name for name in names if name not in index]
    if unknown or not names:
        what = f"no dataset {', '.join(unknown)}" if unknown else "several datasets"
        raise DataError(f"{path}: {what} in it: write {path}#NAME[,NAME…] with names of {', '.join(index)}")
    return tuple(_read_entry(path, name, index[name], pairs=pairs) for name in names)


def _read_entry(path: Path, name: str, entry: dict[str, Any], *, pairs: bool) -> Source:
    """Resolve one entry of the index."""
    where = f"{path}#{name}"
    # Warnings go into the dataset's report, whose digest must not depend on where the index lies.
    label = f"{path.name}#{name}"
    _check_types(where, entry)
    if bool(entry.get("ranking")) != pairs:
        raise DataError(
            f"{where}: its entry says no ranking, and training.objective dpo trains pairs: name an entry with ranking: "
            "true, or set training.objective to sft"
            if pairs
            else f"{where}: a preference dataset (ranking): set training.objective to dpo, which trains pairs"
        )
    media = [key for key in MEDIA if (entry.get("columns") or {}).get(key)]
    if media:
        raise DataError(f"{where}: it has {', '.join(media)}: only text is trained")
    reading, warnings = _read_reading(where, label, entry)
    found = _find_files(path, where, entry)
    num_samples = entry.get("num_samples")
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
        raise DataError(f"{where}: num_samples is {num_samples!r}: a number of rows from 1 is wanted")
    return Source(
        label=label,
        files=tuple(SourceFile(file.path, f"{name}/{file.name}", file.kind) for file in found.files),
        warnings=(*found.warnings, *warnings),
        reading=reading,
        num_samples=num_samples,
        description=json.dumps(entry, sort_keys=True),
    )


def _check_types(where: str, entry: dict[str, Any]) -> None:
    """Refuse values of other types than LLaMA-Factory's.

    Raises:
        DataError: names the key, its value and the type.
    """
    for key in ("file_name", "hf_hub_url", "subset", "split", "folder", "formatting"):
        if not isinstance(entry.get(key), (str, NoneType)):
            raise DataError(f"{where}: {key} is {str(entry[key])[:80]!r}: a text is wanted")
    for key in ("columns", "tags"):
        names = entry.get(key) or {}
        if not isinstance(names, dict) or not all(isinstance(name, (str, NoneType)) for name in names.values()):
            raise DataError(f"{where}: {key} is {str(names)[:80]!r}: names with their columns are wanted")
    if (entry.get("columns") or {}).get("kto_tag"):
        raise DataError(
            f"{where}: it has kto_tag, by which answers are good or bad: keep the rows with good ones, and leave "
            "kto_tag out"
        )


def _find_files(path: Path, where: str, entry: dict[str, Any]) -> Source:
    """Return the entry's files, of the hub or beside the index."""
    if entry.get("hf_hub_url"):
        return find_on_hub(
            entry["hf_hub_url"], entry.get("subset"), entry.get("split", "train"), None, data_folder=entry.get("folder")
        )
    file_name = entry.get("file_name")
    if not isinstance(file_name, str):
        raise DataError(
            f"{where}: it has neither file_name nor hf_hub_url (other hubs, scripts and cloud files are not read): "
            "download the file and name it in file_name"
        )
    file = path.parent / file_name
    check_allowed(file, where)
    if file.is_dir():
        return find_in_folder(file)
    if not file.exists():
        raise DataError(f"{where}: its file {file} is missing: download it, or correct file_name")
    return Source(where, (SourceFile(file, file.name, kind_of_file(file)),))


def _read_reading(where: str, label: str, entry: dict[str, Any]) -> tuple[Reading, list[str]]:
    """Return how the entry's rows are read, and what a person should know about it."""
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"{where}: formatting is {formatting!r}: alpaca, sharegpt or openai is wanted")
    fields = ALPACA_FIELDS if formatting == "alpaca" else SHAREGPT_FIELDS
    defaults = ALPACA_COLUMNS if formatting == "alpaca" else {"messages": "conversations"}
    needed: tuple[str, ...] = ("prompt", "response") if formatting == "alpaca" else ("messages",)
    if entry.get("ranking"):
        fields, needed = RANKING_FIELDS, (needed[0], "chosen", "rejected")
        defaults = {**defaults, "chosen": "chosen", "rejected": "rejected"}
    columns = entry.get("columns") or defaults
    missing = [key for key in needed if not columns.get(key)]
    if missing:
        raise DataError(
            f"{where}: its columns do not name {', '.join(missing)}; where columns are given, the others have no "
            f"default: add them, such as {missing[0]}: {defaults[missing[0]]}"
        )
    mapped = {fields[key]: column for key, column in columns.items() if key in fields and column}
    ours = PREFERENCE if entry.get("ranking") else "alpaca" if formatting == "alpaca" else "sharegpt"
    tags, warnings = _read_tags(label, entry.get("tags")) if formatting == "sharegpt" else (DEFAULT_TAGS, [])
    if formatting == "openai":
        warnings.append(f"{label}: no 'detailed thinking off' is added to the system message, as LLaMA-Factory would")
    return Reading(ours, mapped, tags, only_mapped=True, strict_turns=formatting != "alpaca"), warnings


def _read_tags(label: str, tags: dict[str, str] | None) -> tuple[Tags, list[str]]:
    """Return the names of keys and roles; the usual names of roles are known besides those given."""
    if not tags:
        return DEFAULT_TAGS, []
    roles = {**ROLES, **{tags[key]: role for key, role in ROLE_TAGS.items() if tags.get(key)}}
    role, content = tags.get("role_tag"), tags.get("content_tag")
    warnings = []
    if not tags.get("system_tag"):
        warnings.append(
            f"{label}: its tags name no system_tag, so LLaMA-Factory drops rows that begin with a system message; "
            "they are kept here"
        )
    role_keys = (role, *DEFAULT_TAGS.role_keys) if role else DEFAULT_TAGS.role_keys
    content_keys = (content, *DEFAULT_TAGS.content_keys) if content else DEFAULT_TAGS.content_keys
    return Tags(role_keys, content_keys, roles), warnings
