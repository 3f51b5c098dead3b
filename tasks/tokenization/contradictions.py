"""Pairs of answers of which another row says the opposite: what is preferred here is rejected there."""

from pathlib import Path

import polars as pl

_NUM_NAMED = 5


def warn_of_contradictions(table: Path) -> list[str]:
    """Say how many pairs of a table of examples stand the other way round in another row; nothing where none does.

    Two pairs contradict each other when the chosen tokens of one, its prompt among them, are the rejected ones of the
    other. Their gradients cancel out, and their margin of a held-out row says nothing.

    Args:
        table: train.parquet or eval.parquet of a tokens folder; one without pairs has none.
    """
    scanned = pl.scan_parquet(table)
    if "rejected_ids" not in scanned.collect_schema():
        return []
    chosen, rejected = pl.col("input_ids").hash(), pl.col("rejected_ids").hash()
    pairs = scanned.filter(pl.col("rejected_ids").is_not_null()).select("example_id", chosen=chosen, rejected=rejected)
    others = pairs.select(chosen="rejected", rejected="chosen").unique()
    found = pairs.join(others, on=["chosen", "rejected"], how="semi", maintain_order="left").collect()
    if found.is_empty():
        return []
    names = ", ".join(found["example_id"].head(_NUM_NAMED).to_list())
    more = ", …" if found.height > _NUM_NAMED else ""
    return [
        f"{found.height:,} pairs contradict each other: the chosen answer of one is the rejected answer of another to "
        f"the same prompt, and nothing is learned of them (example_id {names}{more}): leave out the wrong ones"
    ]
