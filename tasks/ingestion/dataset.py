"""From files to validated tables: train.parquet, eval.parquet, rejects.parquet and quality.json.

Three passes: shards of the files become conversations and rejects on disk (intake.py, by workers where there are
several); duplicates, leaks, split and mixture are decided on an index of all rows, without their texts; the chosen
rows are written into the tables, by workers where these have several parts. In memory are some bytes of each row,
whatever its length.
"""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from schemas.config import DataConfig
from schemas.records import Rejects
from tasks.ingestion.counts import DatasetCounts
from tasks.ingestion.errors import DataError
from tasks.ingestion.pieces import REJECT_SCHEMA
from tasks.ingestion.quality_report import describe_dataset
from tasks.ingestion.rejects import Tally, check_budget, describe_rejects, join_tallies
from tasks.ingestion.rows.shingles import join_shingles
from tasks.ingestion.shard_runner import read_all
from tasks.ingestion.shards import SHARD_BYTES, name_sources
from tasks.ingestion.splitting.index import Index, Mask, read_taken
from tasks.ingestion.splitting.mixture import Division, divide
from tasks.ingestion.splitting.near_duplicates import BestMatch, find_near_duplicates
from tasks.ingestion.splitting.order import Store, write_tables
from tasks.ingestion.splitting.pair_search import search_store
from tasks.ingestion.splitting.shard_summary import ShardSummary, collect
from tasks.ingestion.splitting.splits import EVAL
from tasks.ingestion.tables import write_table
from tasks.stored_files import write_list

SHARDS_FOLDER = "shards"
"""Below the dataset's folder, until all is done."""


def build_dataset(
    config: DataConfig,
    *,
    seed: int,
    folder: Path,
    shards: Sequence[Path] | None = None,
    shard_bytes: int = SHARD_BYTES,
    store: Store | None = None,
) -> DatasetCounts:
    """Read, check, split, mix and write a dataset.

    The order is: rows become conversations or rejects; the budget is checked; each dataset is split by itself, its
    copies gone; leaks go, and what several datasets have; training rows are taken by weight or number, and mixed.
    Held-out rows have no weight. rejects.parquet is written even where the dataset is refused. Started again in the
    same folder after it was killed, it goes on after the last finished shard.

    Args:
        config: the datasets and their limits.
        seed: of the split and the mixture.
        folder: where the tables are written; made when missing.
        shards: folders of shards that were read elsewhere, in their order; None reads them here.
        shard_bytes: size of a shard.
        store: where workers put the rows and the tables; the folder then has a list of what is there in their place.

    Raises:
        DataError: nothing can be read, too much is rejected, too few rows are there for a mixture, or nothing is left
            to train or to evaluate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = name_sources(config)
    own_shards = folder / SHARDS_FOLDER
    if shards is None:
        shards = read_all(config, sources, own_shards, shard_bytes, store=store.scratch if store else None)
    try:
        return _build(config, collect(config, sources, shards, seed=seed), folder, seed, store)
    finally:
        shutil.rmtree(own_shards, ignore_errors=True)


def _build(config: DataConfig, summary: ShardSummary, folder: Path, seed: int, store: Store | None) -> DatasetCounts:
    """Decide where the rows go, and write them."""
    index = summary.rows
    frames = (read_taken(piece, "rejects", seed) for piece in index.pieces)
    write_table(frames, REJECT_SCHEMA, Rejects, folder / "rejects.parquet")
    rejects = join_tallies(intake.rejects for intake in summary.intakes)
    num_rows = sum(intake.num_rows for intake in summary.intakes)
    where = ", ".join(dataset.source for dataset in config.datasets)
    check_budget(rejects, num_rows, config.max_rejected_fraction, where)
    division = divide(index, config)
    counts = _count(division, rejects, num_rows)
    _check_sides(counts, rejects, where, config)
    held_out = division.sides == EVAL
    with ThreadPoolExecutor(1) as pool:  # beside the writing: both leave the interpreter to others
        found = pool.submit(_find_pairs, index, division.repeats > 0, held_out, folder / SHARDS_FOLDER)
        wanted = {folder / "train.parquet": division.repeats, folder / "eval.parquet": held_out.astype(np.uint8)}
        stored = write_tables(index, wanted, folder / SHARDS_FOLDER / "tables", store)
        if stored:
            write_list(folder, stored)
        pairs = found.result()
    quality = describe_dataset(counts, summary, division, pairs, rejects, config.screen)
    (folder / "quality.json").write_text(json.dumps(quality, ensure_ascii=False, indent=1), encoding="utf-8")
    return counts


def _count(division: Division, rejects: Tally, num_rows: int) -> DatasetCounts:
    """Add up where the rows of all datasets went."""
    counts = division.count()
    counts.pop("rows_unused")
    rows_in = num_rows - counts["rows_left_out"] + counts["rows_repeated"]
    return DatasetCounts(rows_in=rows_in, rows_rejected=rejects.by_reason, **counts)


def _check_sides(counts: DatasetCounts, rejects: Tally, where: str, config: DataConfig) -> None:
    """Fail when a side of the split is empty that was asked for."""
    if counts.rows_train and (counts.rows_eval or not config.holds_out):
        return
    side = "train" if not counts.rows_train else "evaluate"
    went = (
        f"{counts.rows_read} rows read, {rejects.counts.total()} rejected, {counts.rows_duplicate} copies, "
        f"{counts.rows_leaked} leaked (also held out), {counts.rows_eval} held out"
    )
    listed = f"\n{describe_rejects(rejects)}" if rejects.counts else ""
    wanted = "two different usable" if config.holds_out else "one usable"
    raise DataError(
        f"{where}: no row is left to {side} ({went}): give at least {wanted} "
        f"conversation{'s' if config.holds_out else ''}"
        f"{', and a held-out dataset with other ones' if config.eval_source else ''}{listed}"
    )


def _find_pairs(index: Index, train: Mask, held_out: Mask, scratch: Path) -> list[BestMatch]:
    """Return the near duplicates between the sides, by their places in the index."""
    if all(piece.stored_shingles is not None for piece in index.pieces):
        pairs = search_store(index, train, held_out, scratch)
    else:
        runs = join_shingles([runs for _, runs in index.read_shingles(held_out)])
        pairs = find_near_duplicates(index.read_shingles(train), runs)
    places = np.flatnonzero(held_out)
    return [pair._replace(held_out=int(places[pair.held_out])) for pair in pairs]
