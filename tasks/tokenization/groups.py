"""Makes the examples of one row group: by the fast encoder where it gives the same as rendering, else by rendering.

A row group is made as a whole, and by nothing but what is in it: its examples, its counts and which of its rows are
compared do not depend on which shard it is in, nor on who made the one before. Memory is that of one batch of rows.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from schemas.plurals import count_of
from schemas.records import Rejects
from tasks.tokenization.errors import MaskError
from tasks.tokenization.labels import ID_TYPE, Example
from tasks.tokenization.masking import Conversation, Masked, Plan, build_many, finish, plan_many
from tasks.tokenization.reporting import MaskReport
from tasks.tokenization.tables import (
    EXAMPLE_SCHEMA,
    REJECT_SCHEMA,
    Row,
    join_examples,
    lay_out,
    open_batches,
    read_rows,
)
from tasks.tokenization.templates import PreparedTokenizer

EXAMPLES, REJECTS, REPORT = "examples.arrow", "rejects.arrow", "report.json"
_REPORTS = TypeAdapter(MaskReport)
_MAX_RAW_CHARACTERS = 2000
# Of the conversations that are assembled without rendering, the first ones and one in so many are rendered as well.
_NUM_FIRST_CHECKED = 32
_CHECKED_ONE_IN = 256

Outcome = list[Example] | MaskError
Fast = Callable[[Conversation], list[Example] | None]
"""Makes the examples of a conversation without rendering it, or returns None where it has to be rendered."""


class _NotAsRendered(Exception):  # noqa: N818 - the row group is made again
    """An assembled conversation differs from the rendered one."""


@dataclass
class _Work:
    """What a row group's rows are made with, and counted in."""

    prepared: PreparedTokenizer
    config: TokenizationConfig
    fast: Fast | None
    report: MaskReport = field(default_factory=MaskReport)


def tokenize_group(
    table: Path,
    number: int,
    prepared: PreparedTokenizer,
    config: TokenizationConfig,
    fast: Fast | None,
    folder: Path,
) -> None:
    """Make the examples of one row group, in their rows' order; a row that differs when rendered has all rendered.

    Args:
        table: train.parquet or eval.parquet of a dataset.
        number: Of the row group.
        prepared: The tokenizer.
        config: Masks and limits.
        fast: The fast way, where the tokenizer has one.
        folder: Where examples, rejects and report are written; made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = _Work(prepared, config, fast)
    try:
        _write_group(read_rows(table, number), work, folder)
    except _NotAsRendered as difference:
        work = _Work(prepared, config, None)
        _write_group(read_rows(table, number), work, folder)
        work.report.num_groups_rendered = 1
        work.report.num_rendered_anew = work.report.num_conversations
        work.report.differences.append(str(difference))
    (folder / REPORT).write_bytes(_REPORTS.dump_json(work.report))


def read_report(folder: Path) -> MaskReport:
    """Return a row group's counts."""
    return _REPORTS.validate_json((folder / REPORT).read_bytes())


def _write_group(batches: Iterator[list[Row]], work: _Work, folder: Path) -> None:
    """Write examples and rejects, and count them."""
    rejected_schema = pl.DataFrame(schema=REJECT_SCHEMA).to_arrow().schema
    with (
        open_batches(folder / EXAMPLES, EXAMPLE_SCHEMA) as examples,
        open_batches(folder / REJECTS, rejected_schema) as rejects,
    ):
        for rows, outcomes in _make(batches, work):
            examples.write_table(_lay_out_batch(rows, outcomes, work))
            pairs = zip(rows, outcomes, strict=True)
            refused = [_to_reject(row, outcome) for row, outcome in pairs if isinstance(outcome, MaskError)]
            if refused:
                frame = pl.DataFrame(refused, schema=REJECT_SCHEMA, orient="row")
                rejects.write_table(Rejects.validate(frame).to_arrow().cast(rejected_schema))


def _lay_out_batch(rows: Sequence[Row], outcomes: Sequence[Outcome], work: _Work) -> pa.Table:
    """Count a batch, and lay its examples out as columns."""
    rows_of, examples, rejected = [], [], []
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, MaskError):
            work.report.reject(outcome.reason)
            continue
        work.report.num_conversations += 1
        if row.rejected is not None:
            outcome, other = outcome[:1], outcome[1:]
            rejected += other
        work.report.num_split_conversations += len(outcome) > 1
        rows_of += [row] * len(outcome)
        examples += outcome
    tokenizer = work.prepared.tokenizer
    columns = join_examples(examples)
    work.report.add(examples, columns, work.prepared.stop_token_ids, tokenizer)
    if rejected:
        work.report.add_rejected(examples, rejected, join_examples(rejected), tokenizer)
    return lay_out(rows_of, examples, columns, tokenizer, work.prepared.end_of_turn, rejected)


def _make(batches: Iterator[list[Row]], work: _Work) -> Iterator[tuple[list[Row], list[Outcome]]]:
    """Yield each batch with what its conversations became.

    One thread renders a batch while another encodes the one before: encoding leaves Python to Rust.
    """
    tokenizer, config = work.prepared.tokenizer, work.config
    waiting: tuple[list[Row], list[list[Example] | None], list[int], Future[list[Masked | MaskError]]] | None = None
    with ThreadPoolExecutor(1) as pool:
        for rows in batches:
            if any(row.rejected is not None for row in rows):
                yield rows, _make_pairs(rows, tokenizer, config, work.report)
                continue
            assembled = [work.fast(row.conversation) if work.fast else None for row in rows]
            numbers = [n for n, made in enumerate(assembled) if made is None or _is_checked(rows[n], work.report)]
            plans: list[Plan | MaskError] = plan_many([rows[n].conversation for n in numbers], tokenizer, config)
            pending = pool.submit(finish, plans, tokenizer, config)
            if waiting:
                yield waiting[0], _settle(*waiting, work)
            waiting = rows, assembled, numbers, pending
        if waiting:
            yield waiting[0], _settle(*waiting, work)


def _make_pairs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: TokenizationConfig, report: MaskReport
) -> list[Outcome]:
    """Render both conversations of each row, and return two examples of each; a pair is refused with either."""
    assert all(row.rejected is not None for row in rows), "a part of the rows are pairs"
    both = [side for row in rows for side in (row.conversation, row.rejected) if side is not None]
    made = build_many(both, tokenizer, config)
    outcomes: list[Outcome] = []
    for chosen, rejected in zip(made[::2], made[1::2], strict=True):
        if isinstance(chosen, MaskError):
            outcomes.append(chosen)
            continue
        if isinstance(rejected, MaskError):
            outcomes.append(MaskError(rejected.reason, f"in the rejected answer: {rejected}"))
            continue
        pair = _pair(chosen.examples, rejected.examples, config)
        outcomes.append(pair)
        if isinstance(pair, MaskError):
            continue
        for masked in (chosen, rejected):
            report.num_literals += masked.num_literals
            report.dropped.update(masked.dropped)
        report.literal_endings.update(chosen.literal_endings)  # the other's are not learned
    return outcomes


def _pair(chosen: list[Example], rejected: list[Example], config: TokenizationConfig) -> Outcome:
    """Return both examples of a pair, which have the same prompt."""
    if len(chosen) > 1 or len(rejected) > 1:
        return MaskError(
            "pair_in_parts",
            f"the chat template renders the turns of its answers as {max(len(chosen), len(rejected))} prompts, and a "
            "pair has one: give pairs of one answer each",
        )
    prompts = [example.ids[: example.spans[0][0] * ID_TYPE.itemsize] for example in (chosen[0], rejected[0])]
    if prompts[0] != prompts[1]:
        cut = chosen[0].truncated or rejected[0].truncated
        if not cut:
            return MaskError("pair_prompts_differ", "the chat template writes another prompt before either answer")
        return MaskError(
            "prompt_too_long",
            f"to fit into tokenization.max_length = {config.max_length} its two prompts were cut at different places: "
            "raise it, or shorten the row",
        )
    if chosen[0].ids == rejected[0].ids:
        return MaskError("same_answers", _explain_sameness(chosen[0].truncated or rejected[0].truncated, config))
    return [chosen[0], rejected[0]]


def _explain_sameness(is_cut: bool, config: TokenizationConfig) -> str:
    """Say why two answers that differ as text became the same tokens: such a pair has no gradient."""
    if is_cut:
        return f"cut to tokenization.max_length = {config.max_length}, both answers are the same: raise it"
    return (
        "the chat template writes both answers alike: they differ only in what it leaves out, such as spaces at the end"
    )


def _is_checked(row: Row, report: MaskReport) -> bool:
    """Tell whether an assembled conversation is rendered as well; which ones depends on the dataset alone."""
    checked = report.num_checked < _NUM_FIRST_CHECKED or crc32(row.example_id.encode()) % _CHECKED_ONE_IN == 0
    report.num_checked += checked
    return checked


def _settle(
    rows: Sequence[Row],
    assembled: Sequence[list[Example] | None],
    numbers: Sequence[int],
    pending: "Future[list[Masked | MaskError]]",
    work: _Work,
) -> list[Outcome]:
    """Put assembled and rendered conversations together.

    Raises:
        _NotAsRendered: one that is both is not the same.
    """
    outcomes: dict[int, Outcome] = {n: made for n, made in enumerate(assembled) if made is not None}
    for number, outcome in zip(numbers, pending.result(), strict=True):
        row, made = rows[number], assembled[number]
        if made is not None:
            expected = outcome.examples if isinstance(outcome, Masked) else []
            if expected != made:
                raise _NotAsRendered(f"{row.source}, line {row.line} became {_differ(made, expected)}")
        elif isinstance(outcome, MaskError):
            outcomes[number] = outcome
        else:
            work.report.num_literals += outcome.num_literals
            work.report.dropped.update(outcome.dropped)
            work.report.literal_endings.update(outcome.literal_endings)
            outcomes[number] = outcome.examples
    return [outcomes[number] for number in range(len(rows))]


def _differ(made: Sequence[Example], expected: Sequence[Example]) -> str:
    """Say how examples differ from the rendered ones."""
    if len(made) != len(expected):
        return f"{count_of(len(made), 'example')} in place of {len(expected):,}"
    for example, wanted in zip(made, expected, strict=True):
        ids, others = example.input_ids, wanted.input_ids
        if ids != others:
            place = next((n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), len(others))
            return f"{len(ids)} tokens in place of {len(others)}, the first different one at position {place}"
    return "examples with other labels or targets"


def _to_reject(row: Row, outcome: MaskError) -> tuple[Any, ...]:
    place = (row.example_id, row.source, row.line)
    return (*place, outcome.reason, str(outcome), row.raw[:_MAX_RAW_CHARACTERS])
