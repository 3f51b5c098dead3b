"""The results of all shards put together: statistics and rejects of each dataset, and the index of their rows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from schemas.config import DataConfig
from schemas.plurals import count_of
from tasks.ingestion.errors import DataError
from tasks.ingestion.pieces import find_stored, read_frame, read_summary
from tasks.ingestion.rejects import Reject, Tally
from tasks.ingestion.sources.files import Source
from tasks.ingestion.sources.json_files import raise_no_json
from tasks.ingestion.splitting.index import Index, Piece, read_taken
from tasks.ingestion.splitting.ranks import Ranks, find_border, first_bits, rank_places


@dataclass
class SourceStats:
    """What came out of a dataset's files; num_rows = conversations + rejects."""

    name: str = ""
    """The dataset's name for people, without the folders above it."""
    num_rows: int = 0
    rejects: Tally = field(default_factory=Tally)
    files: list[dict[str, Any]] = field(default_factory=list)
    """By file: name, rows, and the format and columns it was read by."""
    unused: Counter[str] = field(default_factory=Counter)
    """What the data has and nobody reads, with the number of its rows or messages."""
    warnings: list[str] = field(default_factory=list)


class ShardSummary(NamedTuple):
    """All datasets' rows."""

    intakes: list[SourceStats]
    """By dataset; a held-out one is the last."""
    rows: Index


def collect(
    config: DataConfig, sources: Sequence[Sequence[Source]], shards: Sequence[Path], *, seed: int
) -> ShardSummary:
    """Put the shards' results together, in the order of the rows.

    Args:
        config: the datasets.
        sources: of each dataset.
        shards: folders of finished shards, in their order.
        seed: of the choice of rows, where a source takes only some.

    Raises:
        DataError: a source holds no row, or a file of lines no JSON.
    """
    summaries = [(folder, read_summary(folder)) for folder in shards]
    held_out = config.held_out_dataset
    datasets = (*config.datasets, *([] if held_out is None else [held_out]))
    intakes: list[SourceStats] = []
    pieces: list[Piece] = []
    bounds = [0]
    for number, (dataset, own) in enumerate(zip(datasets, sources, strict=True)):
        intake = SourceStats(PurePath(dataset.source).name)
        intakes.append(intake)
        for place, source in enumerate(own):
            entries = [entry for entry in summaries if _name_source(entry[1]) == (number, place)]
            if entries:
                _gather_source(intake, source, entries, pieces, seed)
        bounds.append(pieces[-1].start + pieces[-1].num_rows if pieces else 0)
        assert intake.num_rows == bounds[-1] - bounds[-2] + intake.rejects.counts.total()
    return ShardSummary(intakes, Index(pieces, bounds, seed))


Entries = Sequence[tuple[Path, dict[str, Any]]]


def _name_source(summary: dict[str, Any]) -> tuple[int, int]:
    """Return the places of a shard's dataset and source."""
    return summary["parts"][0]["dataset"], summary["parts"][0]["source"]


def _gather_source(intake: SourceStats, source: Source, entries: Entries, pieces: list[Piece], seed: int) -> None:
    """Add what came out of one source to its dataset and to the pieces."""
    parts = [part for _, summary in entries for part in summary["parts"]]
    num_rows = sum(part["num_rows"] for part in parts)
    if not num_rows:
        raise DataError(f"{source.label}: empty, there is no row in it: give a dataset with at least two rows")
    files = _join_parts(parts)
    intake.files += files
    for part in parts:
        intake.unused.update(part["unused"])
    intake.warnings += [*source.warnings, *_warn_of_files(source.label, files, parts)]
    limit = None
    if source.num_samples is not None and source.num_samples > num_rows:
        intake.warnings.append(
            f"{source.label}: num_samples is {source.num_samples} and there are {num_rows} rows: each is taken once, "
            "no copies are made"
        )
    elif source.num_samples is not None:
        limit, num_rows = _find_limit(entries, source.num_samples, seed), source.num_samples
    intake.num_rows += num_rows
    for folder, summary in entries:
        for number in range(summary["num_pieces"]):
            start = pieces[-1].start + pieces[-1].num_rows if pieces else 0
            stored = find_stored(folder, "rows", number), find_stored(folder, "shingles", number)
            piece = Piece(folder, number, start, 0, limit, *stored)
            pieces.append(piece._replace(num_rows=read_taken(piece, "index", seed, ("line",)).height))
            intake.rejects.add(map(Reject._make, read_taken(piece, "rejects", seed).iter_rows()))


def _join_parts(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was read of each file.

    Raises:
        DataError: no line of a file is JSON.
    """
    files: dict[str, dict[str, Any]] = {}
    broken: Counter[str] = Counter()
    for part in parts:
        layout: tuple[str | None, dict[str, str]] = part["layout"] or (None, {})
        file = files.setdefault(part["name"], {"name": part["name"], "num_rows": 0, "format": None, "columns": {}})
        file["num_rows"] += part["num_rows"]
        if file["format"] is None:
            file["format"], file["columns"] = layout
        broken[part["name"]] += part["num_broken"]
    for part in parts:
        if part["divided"] and broken[part["name"]] == files[part["name"]]["num_rows"] > 0:
            raise_no_json(Path(part["path"]), part["first_broken"])
    return list(files.values())


def _warn_of_files(label: str, files: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Say which files are empty, and that rows are kept that another program would drop."""
    empty = [file["name"] for file in files if not file["num_rows"]]
    if empty:
        yield f"{count_of(len(empty), 'file')} without a row: {', '.join(empty[:10])}"
    num_odd_turns = sum(part["num_odd_turns"] for part in parts)
    if num_odd_turns:
        yield (
            f"{label}: {count_of(num_odd_turns, 'row is', 'rows are')} kept here whose turns do not alternate: "
            "LLaMA-Factory would drop such rows without a word"
        )


def _find_limit(entries: Entries, num_samples: int, seed: int) -> int:
    """Return the rank up to which `num_samples` rows, rejects included, are taken; the others were not read."""
    border, left = find_border(_read_ranks(entries, seed), num_samples)
    near = np.concatenate([ranks[first_bits(ranks) == border] for ranks in _read_ranks(entries, seed)])
    return int(np.sort(near)[left - 1])


def _read_ranks(entries: Entries, seed: int) -> Iterator[Ranks]:
    """Yield the ranks of a source's rows, by their places."""
    for folder, summary in entries:
        for number in range(summary["num_pieces"]):
            for name in ("index", "rejects"):
                yield rank_places(read_frame(folder, name, number, ("source", "line")), seed)
