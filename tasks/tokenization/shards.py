"""A range of a dataset's rows becomes examples: examples.parquet, rejects.parquet, report.json.

A shard is a range of row groups of a part's table, so that it is read without what lies around it. Its memory is that
of one batch of rows, whatever its size.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from pydantic import TypeAdapter

from schemas.config import TokenizationConfig
from schemas.records import Rejects
from tasks.tokenization.assembly import Assembler, open_assembler
from tasks.tokenization.errors import MaskError
from tasks.tokenization.masking import Conversation, Masked, Plan, build_many, finish, plan_many
from tasks.tokenization.reporting import MaskReport
from tasks.tokenization.tables import EXAMPLE_SCHEMA, REJECT_SCHEMA, Line, Row, join_lines, lay_out, read_rows, to_line
from tasks.tokenization.templates import PreparedTokenizer, prepare_tokenizer

ROWS_PER_SHARD = 50_000
EXAMPLES, REJECTS, REPORT = "examples.parquet", "rejects.parquet", "report.json"
_REPORTS = TypeAdapter(MaskReport)
_MAX_RAW_CHARACTERS = 2000
# Of the conversations that are assembled without rendering, the first ones and one in so many are rendered as well.
_NUM_FIRST_CHECKED = 32
_CHECKED_ONE_IN = 256

Outcome = list[Line] | MaskError


class _NotAsRendered(Exception):  # noqa: N818 - the shard is made again
    """An assembled conversation differs from the rendered one."""


@dataclass
class _Work:
    """What a shard's rows are made with, and counted in."""

    prepared: PreparedTokenizer
    config: TokenizationConfig
    assembler: Assembler | None
    report: MaskReport = field(default_factory=MaskReport)


def plan_shards(table: Path, rows_per_shard: int = ROWS_PER_SHARD) -> list[list[int]]:
    """Divide a table's row groups into shards of at most so many rows, or of one row group; at least one shard."""
    metadata = pq.ParquetFile(table).metadata
    shards: list[list[int]] = [[]]
    num_rows = 0
    for number in range(metadata.num_row_groups):
        size = metadata.row_group(number).num_rows
        if shards[-1] and num_rows + size > rows_per_shard:
            shards.append([])
            num_rows = 0
        shards[-1].append(number)
        num_rows += size
    return shards


def tokenize_shard(
    table: Path, row_groups: Sequence[int], prepared: PreparedTokenizer, config: TokenizationConfig, folder: Path
) -> None:
    """Make the examples of a range of row groups, in their rows' order.

    Args:
        table: train.parquet or eval.parquet of a dataset.
        row_groups: By number; a table without rows may have none.
        prepared: The tokenizer.
        config: Masks and limits.
        folder: Where the three files are written; made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        report = _write_shard(
            table, row_groups, _Work(prepared, config, open_assembler(prepared.tokenizer, config)), folder
        )
    except _NotAsRendered:
        report = _write_shard(table, row_groups, _Work(prepared, config, None), folder)
    (folder / REPORT).write_bytes(_REPORTS.dump_json(report))


def work_on_shard(
    table: Path,
    row_groups: Sequence[int],
    tokenizer_folder: Path,
    chat_template: str | None,
    config: TokenizationConfig,
    folder: Path,
) -> None:
    """Make a shard as `tokenize_shard` does, in a process that has no tokenizer yet; it is kept for the next shard."""
    tokenize_shard(table, row_groups, _prepare(tokenizer_folder, chat_template), config, folder)


_prepare = lru_cache(maxsize=1)(prepare_tokenizer)


def read_report(folder: Path) -> MaskReport:
    """Return a shard's counts."""
    return _REPORTS.validate_json((folder / REPORT).read_bytes())


def _write_shard(table: Path, row_groups: Sequence[int], work: _Work, folder: Path) -> MaskReport:
    """Write a shard's examples and rejects; return its counts."""
    rejected_schema = pl.DataFrame(schema=REJECT_SCHEMA).to_arrow().schema
    with (
        pq.ParquetWriter(folder / EXAMPLES, EXAMPLE_SCHEMA) as examples,
        pq.ParquetWriter(folder / REJECTS, rejected_schema) as rejects,
    ):
        for rows, outcomes in _make(read_rows(table, row_groups), work):
            examples.write_table(_lay_out_batch(rows, outcomes, work))
            pairs = zip(rows, outcomes, strict=True)
            refused = [_to_reject(row, outcome) for row, outcome in pairs if isinstance(outcome, MaskError)]
            if refused:
                frame = pl.DataFrame(refused, schema=REJECT_SCHEMA, orient="row")
                rejects.write_table(Rejects.validate(frame).to_arrow().cast(rejected_schema))
    return work.report


def _lay_out_batch(rows: Sequence[Row], outcomes: Sequence[Outcome], work: _Work) -> pa.Table:
    """Count a batch, and lay its examples out as columns."""
    example_ids, lines = [], []
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, MaskError):
            work.report.reject(outcome.reason)
            continue
        work.report.num_conversations += 1
        work.report.num_split_conversations += len(outcome) > 1
        example_ids += [row.example_id] * len(outcome)
        lines += outcome
    columns = join_lines(lines)
    work.report.add(lines, columns, work.prepared.stop_token_ids, work.prepared.tokenizer)
    return lay_out(example_ids, lines, columns, work.prepared.tokenizer)


def _make(batches: Iterator[list[Row]], work: _Work) -> Iterator[tuple[list[Row], list[Outcome]]]:
    """Yield each batch with what its conversations became.

    One thread renders a batch while another encodes the one before: encoding leaves Python to Rust.
    """
    tokenizer, config = work.prepared.tokenizer, work.config
    waiting: tuple[list[Row], list[list[Line] | None], list[int], Future[list[Masked | MaskError]]] | None = None
    with ThreadPoolExecutor(1) as pool:
        for rows in batches:
            assembled = [work.assembler.assemble(row.conversation) if work.assembler else None for row in rows]
            numbers = [n for n, lines in enumerate(assembled) if lines is None or _is_checked(rows[n], work.report)]
            plans: list[Plan | MaskError] = plan_many([rows[n].conversation for n in numbers], tokenizer, config)
            pending = pool.submit(finish, plans, tokenizer, config)
            if waiting:
                yield waiting[0], _settle(*waiting, work)
            waiting = rows, assembled, numbers, pending
        if waiting:
            yield waiting[0], _settle(*waiting, work)


def _is_checked(row: Row, report: MaskReport) -> bool:
    """Tell whether an assembled conversation is rendered as well; which ones depends on the dataset alone."""
    checked = report.num_checked < _NUM_FIRST_CHECKED or crc32(row.example_id.encode()) % _CHECKED_ONE_IN == 0
    report.num_checked += checked
    return checked


def _settle(
    rows: Sequence[Row],
    assembled: Sequence[list[Line] | None],
    numbers: Sequence[int],
    pending: "Future[list[Masked | MaskError]]",
    work: _Work,
) -> list[Outcome]:
    """Put assembled and rendered conversations together.

    Raises:
        _NotAsRendered: one that is both is not the same.
    """
    outcomes: dict[int, Outcome] = {n: lines for n, lines in enumerate(assembled) if lines is not None}
    for number, rendered in zip(numbers, pending.result(), strict=True):
        row, lines = rows[number], assembled[number]
        outcome = _retry_adapted(row, rendered, work)
        if lines is not None:
            expected = (
                [to_line(row, example, work.prepared.end_of_turn) for example in outcome.examples]
                if isinstance(outcome, Masked)
                else []
            )
            if [line.normal() for line in expected] != [line.normal() for line in lines]:
                raise _NotAsRendered(row.example_id)
        elif isinstance(outcome, MaskError):
            outcomes[number] = outcome
        else:
            work.report.num_literals += outcome.num_literals
            work.report.dropped.update(outcome.dropped)
            outcomes[number] = [to_line(row, example, work.prepared.end_of_turn) for example in outcome.examples]
    return [outcomes[number] for number in range(len(rows))]


def _to_reject(row: Row, outcome: MaskError) -> tuple[Any, ...]:
    place = (row.example_id, row.source, row.line)
    return (*place, outcome.reason, str(outcome), row.raw[:_MAX_RAW_CHARACTERS])


def _retry_adapted(row: Row, outcome: Masked | MaskError, work: _Work) -> Masked | MaskError:
    """Give a template that refuses tool calls an empty content or arguments as JSON text, which some expect."""
    if not isinstance(outcome, MaskError) or outcome.reason not in ("template_error", "null_content"):
        return outcome
    for as_text in (False, True):
        messages = [_adapt(message, as_text) for message in row.conversation.messages]
        if messages == row.conversation.messages:
            continue
        again = build_many([Conversation(messages, row.conversation.tools)], work.prepared.tokenizer, work.config)[0]
        if isinstance(again, Masked):
            work.report.num_adapted += 1
            return again
    return outcome


def _adapt(message: dict[str, Any], as_text: bool) -> dict[str, Any]:
    """Copy a message that calls tools with a content that is not null and, if wanted, its arguments as JSON text."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, dict) else None
        if as_text and isinstance(function, dict) and not isinstance(function.get("arguments"), str):
            text = json.dumps(function.get("arguments"), ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": text}}
        calls.append(call)
    return {**message, "content": message.get("content") or "", "tool_calls": calls}
