"""Pairs of answers of which another row says the opposite: what is preferred here is rejected there."""

import hashlib
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tasks.partitions import list_parts

_NUM_NAMED = 5
_DIGEST_BYTES = 16
_SCHEMA: dict[str, Any] = {"example_id": pl.String, "chosen": pl.Binary, "rejected": pl.Binary}


def read_pairs(table: Path) -> pl.DataFrame:
    """Return the example_id of each pair of a table of examples, with digests of the tokens of both answers.

    Args:
        table: train.parquet or eval.parquet of a tokens folder, or a part of one; one without pairs has none.
    """
    frames = [pl.DataFrame(schema=_SCHEMA)]
    for part in list_parts(table):
        if not _has_pairs(part):
            continue
        pairs = pl.scan_parquet(part).filter(pl.col("rejected_ids").is_not_null())
        rows = pairs.select("example_id", "input_ids", "rejected_ids").collect()
        digests = {"chosen": _digest(rows["input_ids"]), "rejected": _digest(rows["rejected_ids"])}
        frames.append(pl.DataFrame({"example_id": rows["example_id"], **digests}, schema=_SCHEMA))
    return pl.concat(frames)


def _has_pairs(part: Path) -> bool:
    """Tell by a file's statistics whether any row is a pair: of most tables nothing else need be read."""
    metadata = pq.read_metadata(part)
    if "rejected_ids" not in pq.read_schema(part).names:
        return False
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        known = [column.statistics for column in columns if column.path_in_schema.split(".")[0] == "rejected_ids"]
        if any(statistics is None or statistics.num_values for statistics in known):
            return True
    return False


def _digest(lists: pl.Series) -> list[bytes]:
    """Return a digest of each list of ids, the same on every machine."""
    return [hashlib.blake2b(ids.to_numpy().tobytes(), digest_size=_DIGEST_BYTES).digest() for ids in lists]


def warn_of_contradictions(pairs: pl.DataFrame) -> list[str]:
    """Say how many pairs stand the other way round in another row; nothing where none does.

    Two pairs contradict each other when the chosen tokens of one, its prompt among them, are the rejected ones of the
    other. Their gradients cancel out, and their margin of a held-out row says nothing.

    Args:
        pairs: as `read_pairs` gives them.
    """
    others = pairs.select(chosen="rejected", rejected="chosen").unique()
    found = pairs.join(others, on=["chosen", "rejected"], how="semi", maintain_order="left")
    if found.is_empty():
        return []
    names = ", ".join(found["example_id"].head(_NUM_NAMED).to_list())
    more = ", …" if found.height > _NUM_NAMED else ""
    return [
        f"{found.height:,} pairs contradict each other: the chosen answer of one is the rejected answer of another to "
        f"the same prompt, and nothing is learned of them (example_id {names}{more}): leave out the wrong ones"
    ]
