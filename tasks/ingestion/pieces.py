"""What a shard leaves on disk: pieces of about PIECE_ROWS conversations, and a summary.

Of each piece there are `rows-N.arrow` (the columns of train.parquet), `index-N.arrow` (what duplicates, leaks, splits
and statistics are found by: about 150 bytes a row), `shingles-N.npz` (what near duplicates are found by) and
`rejects-N.arrow`.
"""

import hashlib
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from schemas.records import Conversations, Rejects, columns_of
from tasks.ingestion.rejects import Reject
from tasks.ingestion.rows.identity import UsableRow
from tasks.ingestion.rows.quality import TEXT_PROBLEMS
from tasks.ingestion.rows.shingles import Shingles, hash_shingles
from tasks.parcels import find
from tasks.stored_files import StoredFile, put_file, read_file

Compression = Literal["uncompressed", "zstd"]
PIECE_ROWS = 20_000
SUMMARY_NAME = "summary.json"
_NOTE = ".json"
CONVERSATION_SCHEMA = columns_of(Conversations)
REJECT_SCHEMA = columns_of(Rejects)
INDEX_SCHEMA: dict[str, Any] = {
    "example_id": pl.Binary,
    "source": pl.Categorical,
    "line": pl.UInt32,
    "keys": pl.Binary,
    "prompt_key": pl.Binary,
    "num_turns": pl.UInt32,
    "prompt_characters": pl.UInt32,
    "answer_characters": pl.UInt32,
    "problems": pl.UInt8,
    "found": pl.String,
    "has_tools": pl.Boolean,
}
# The bit of each problem in the index.
PROBLEM_BITS = {code: 1 << place for place, code in enumerate(TEXT_PROBLEMS)}


class StoredContent(NamedTuple):
    """The rows of a piece with their texts, or what near duplicates are found by, in an object store."""

    address: str
    file: StoredFile


def make_index(conversations: Sequence[UsableRow]) -> pl.DataFrame:
    """Return what is known of each conversation without its text.

    Loose keys are joined: the first 16 bytes are those up to the first answer. Kinds of what was found are joined by
    commas.
    """
    columns = list(zip(*conversations, strict=True)) or [()] * len(UsableRow._fields)
    values = dict(zip(UsableRow._fields, columns, strict=True))
    return pl.DataFrame(
        {
            "example_id": pl.Series(values["example_id"], dtype=pl.String).str.decode("hex"),
            "source": values["source"],
            "line": values["line"],
            "keys": [keys[0] if len(keys) == 1 else b"".join(keys) for keys in values["keys"]],
            "prompt_key": values["prompt_key"],
            "num_turns": values["num_turns"],
            "prompt_characters": values["prompt_characters"],
            "answer_characters": values["answer_characters"],
            "problems": [sum(PROBLEM_BITS[code] for code in codes) if codes else 0 for codes in values["problems"]],
            "found": [",".join(kinds) if kinds else "" for kinds in values["found"]],
            "has_tools": [tools is not None for tools in values["tools"]],
        },
        schema=INDEX_SCHEMA,
    )


def name_rows(folder: Path, number: int) -> Path:
    """Return the file of a piece's rows with their texts."""
    return folder / f"rows-{number}.arrow"


def write_piece(
    folder: Path,
    number: int,
    conversations: Sequence[UsableRow],
    rejects: Sequence[Reject],
    *,
    compression: Compression = "uncompressed",
) -> None:
    """Write one piece of a shard.

    Args:
        folder: of the shard.
        number: of the piece.
        conversations: its rows.
        rejects: what became no row.
        compression: of the rows: on a disk it costs more time than it saves, on the way to a store less.
    """
    columns = list(zip(*(row[: len(CONVERSATION_SCHEMA)] for row in conversations), strict=True)) or [()] * len(
        CONVERSATION_SCHEMA
    )
    rows = pl.DataFrame(dict(zip(CONVERSATION_SCHEMA, columns, strict=True)), schema=CONVERSATION_SCHEMA)
    rows.write_ipc(name_rows(folder, number), compression=compression)
    make_index(conversations).write_ipc(folder / f"index-{number}.arrow")
    runs = hash_shingles([row.text for row in conversations])
    np.savez(folder / f"shingles-{number}.npz", hashes=runs.hashes, bounds=runs.bounds)
    pl.DataFrame(rejects, schema=REJECT_SCHEMA, orient="row").write_ipc(folder / f"rejects-{number}.arrow")


def put_away(folder: Path, store: str) -> None:
    """Put what grows with a shard's texts into a store, its rows and its shingles, and note there where they are.

    Args:
        folder: of the shard.
        store: address of a folder; the files have the digests of their contents as names.
    """
    for path in sorted([*folder.glob("rows-*.arrow"), *folder.glob("shingles-*.npz")]):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        address = f"{store}/{digest}{path.suffix}"
        note = StoredContent(address, put_file(path, address, sha256=digest))
        path.with_suffix(_NOTE).write_text(json.dumps(note), encoding="utf-8")
        path.unlink()


def find_stored(folder: Path, name: str, number: int) -> StoredContent | None:
    """Return where the rows or the shingles of a piece are, where they are in a store."""
    path = folder / f"{name}-{number}{_NOTE}"
    if not path.is_file():
        return None
    address, file = json.loads(path.read_text(encoding="utf-8"))
    return StoredContent(address, StoredFile(*file))


def read_stored(stored: StoredContent, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Return columns (all of them for None) of the rows of a piece that are in a store."""
    return pl.read_ipc(read_file(*stored), columns=None if columns is None else list(columns))


def read_stored_shingles(stored: StoredContent) -> Shingles:
    """Return the sets by which near duplicates of a piece are found, which are in a store."""
    with np.load(BytesIO(read_file(*stored))) as values:
        return Shingles(values["hashes"], values["bounds"])


def write_summary(folder: Path, parts: Sequence[dict[str, Any]], num_pieces: int) -> None:
    """Write what a shard holds; a shard is finished when this is there."""
    summary = {"num_pieces": num_pieces, "parts": parts}
    # "replace" turns half surrogates, which names of columns may hold, into question marks.
    (folder / SUMMARY_NAME).write_bytes(json.dumps(summary, ensure_ascii=False).encode("utf-8", "replace"))


def read_summary(folder: Path) -> dict[str, Any]:
    """Return a shard's number of pieces, and what was read of each of its parts."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
    return summary


def read_shingles(folder: Path, number: int) -> Shingles:
    """Return the sets by which near duplicates of a piece are found."""
    with np.load(folder / f"shingles-{number}.npz") as values:
        return Shingles(values["hashes"], values["bounds"])


def read_frame(folder: Path, name: str, number: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Return columns (all of them for None) of the rows, index or rejects of a piece, in memory of its own."""
    # Through bytes: what is mapped into memory counts as resident, and a piece may be deleted while its rows are used.
    data = find(folder / f"{name}-{number}.arrow").read_bytes()
    return pl.read_ipc(data, columns=None if columns is None else list(columns))
