"""Shards: the parts of a dataset's files that are read independently, each by any process or machine.

A shard is about 16 MB of consecutive rows: a range of bytes of a JSONL file, a JSON list or a CSV file that ends with a
row, row groups of a Parquet file, record batches of an Arrow file, or whole files (spans.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict

from schemas.config import DataConfig
from tasks.ingestion.rows.layouts import Layout, Reading
from tasks.ingestion.rows.matching import ROWS_LOOKED_AT, find_layout
from tasks.ingestion.rows.screening import Screen
from tasks.ingestion.sources.columnar import WHOLE, FileSpan
from tasks.ingestion.sources.files import Source, SourceFile
from tasks.ingestion.sources.readers import read_rows
from tasks.ingestion.sources.remote import read_range
from tasks.ingestion.sources.remote_files import RemoteFile
from tasks.ingestion.sources.sources import find_sources
from tasks.ingestion.spans import Spans, Survey, divide, survey_all

SHARD_BYTES = 16 << 20
_FRONT_BYTES = 1 << 20
"""Of a remote file of lines, in which its first rows are looked for."""


class ShardPart(BaseModel):
    """Rows of one file that lie together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: int
    """Place of its dataset in the run; a held-out one is the last."""
    source: int
    """Place of its source in the dataset."""
    file: SourceFile
    span: FileSpan
    num_bytes: int
    reading: Reading
    layout: Layout | None
    """Format and columns of the file, where it was looked up because the file is divided."""


class Shard(BaseModel):
    """Parts that are read in one go."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: tuple[ShardPart, ...]
    screen: Screen


def plan_shards(
    config: DataConfig, sources: Sequence[Sequence[Source]], shard_bytes: int = SHARD_BYTES
) -> Iterator[Shard]:
    """Divide all datasets, in their order; no shard holds rows of two sources. A file is looked at in its turn.

    The lines of remote files are counted before that, of all at once.

    Raises:
        DataError: a source is missing, or the first rows of a file that is divided fit no format.
    """
    files = (file for named in sources for source in named for file in source.files)
    surveys = survey_all(files, shard_bytes)
    return join_parts(plan_parts(config, sources, shard_bytes, surveys), config.screen, shard_bytes)


def join_parts(parts: Iterable[ShardPart], screen: Screen, shard_bytes: int) -> Iterator[Shard]:
    """Put small parts of one source together."""
    waiting: list[ShardPart] = []
    for part in parts:
        size = part.num_bytes + sum(other.num_bytes for other in waiting)
        same = waiting and (waiting[-1].dataset, waiting[-1].source) == (part.dataset, part.source)
        if waiting and (not same or size > shard_bytes):
            yield Shard(parts=tuple(waiting), screen=screen)
            waiting = []
        waiting.append(part)
    if waiting:
        yield Shard(parts=tuple(waiting), screen=screen)


def plan_parts(
    config: DataConfig,
    sources: Sequence[Sequence[Source]],
    shard_bytes: int,
    surveys: Mapping[RemoteFile, Survey] = MappingProxyType({}),
) -> Iterator[ShardPart]:
    """Yield the parts of all files, in the order of their rows.

    Args:
        config: the datasets.
        sources: of each dataset.
        shard_bytes: wanted of a part.
        surveys: of remote files whose lines were counted already.
    """
    for dataset, named in enumerate(sources):
        own = (*config.datasets, config.held_out_dataset)[dataset]
        assert own is not None
        for place, source in enumerate(named):
            reading = replace(
                source.reading or Reading(own.format, own.columns),
                ignored_columns=own.ignored_columns,
                trim_trailing_user=config.trim_trailing_user,
            )
            for file in source.files:
                layout, spans = _divide(file, reading, shard_bytes, surveys)
                for span, num_bytes in spans:
                    yield ShardPart(
                        dataset=dataset,
                        source=place,
                        file=file,
                        span=span,
                        num_bytes=num_bytes,
                        reading=reading,
                        layout=layout,
                    )


def name_sources(config: DataConfig) -> list[list[Source]]:
    """Return the sources of each dataset, a held-out one last, no two files with one name.

    Where two files of different datasets have the same name, the later one's gets its dataset's place as a folder, so
    that a source and a line always name one row.
    """
    named = []
    names: set[str] = set()
    held_out = config.held_out_dataset
    for number, dataset in enumerate((*config.datasets, *([] if held_out is None else [held_out])), start=1):
        folder = "held-out" if dataset is held_out else f"dataset-{number}"
        named.append(_name_apart(find_sources(dataset), folder, names))
    return named


def _name_apart(sources: Sequence[Source], folder: str, names: set[str]) -> list[Source]:
    """Give files whose names are taken a folder before their name; `names` are the taken ones, and is added to."""
    apart = []
    for source in sources:
        taken = any(file.name in names for file in source.files)
        files = [replace(file, name=f"{folder}/{file.name}") if taken else file for file in source.files]
        names.update(file.name for file in files)
        apart.append(replace(source, files=tuple(files)))
    return apart


def _divide(
    file: SourceFile, reading: Reading, shard_bytes: int, surveys: Mapping[RemoteFile, Survey]
) -> tuple[Layout | None, Spans]:
    """Return the spans of a file with their sizes, and its layout where there are several."""
    spans = divide(file, shard_bytes, surveys)
    if len(spans) < 2:
        return None, [(WHOLE, file.num_bytes)]
    fronts = [*_cut_front(file, spans[0][0]), *(span for span, _ in spans[1:])]
    rows = chain.from_iterable(read_rows(file, span) for span in fronts)
    first = [row.value for row in islice(rows, ROWS_LOOKED_AT) if row.problem is None]
    layout = find_layout(first, reading, file.shown)
    # Without a layout in its first rows a file's rows must be looked at one after the other.
    return (layout, spans) if layout else (None, [(WHOLE, file.num_bytes)])


def _cut_front(file: SourceFile, span: FileSpan) -> list[FileSpan]:
    """Return the first span of a remote file of lines in two, so that a few rows need not bring all of them."""
    if file.remote is None or file.kind != "jsonl" or span.stop is None:
        return [span]
    front = b"".join(read_range(file.remote, span.start, min(span.stop, span.start + _FRONT_BYTES)))
    cut = span.start + front.rfind(b"\n") + 1
    if cut in (span.start, span.stop):
        return [span]
    return [span._replace(stop=cut), span._replace(start=cut, first_row=span.first_row + front.count(b"\n"))]
