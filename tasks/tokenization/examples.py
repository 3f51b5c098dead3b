"""A dataset folder becomes a tokens folder: train.parquet, eval.parquet, rejects.parquet, masks.json, tokenizer/.

Where train.parquet is a folder of parts, there is train.index beside it.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl

from schemas.config import TokenizationConfig
from tasks import execution
from tasks.models import load_tokenizer
from tasks.partitions import count_rows, name_part
from tasks.progress import Tell
from tasks.stored_files import read_list, write_list
from tasks.tokenization.contradictions import read_pairs, warn_of_contradictions
from tasks.tokenization.groups import EXAMPLES, REJECTS, read_report
from tasks.tokenization.reporting import MaskReport
from tasks.tokenization.saving import check_saved, probe, save_prompt_settings, save_stops, save_tokenizer
from tasks.tokenization.shards import (
    INDEX,
    PAIRS,
    PART,
    TableShare,
    enclose,
    enclose_stored_part,
    find_groups,
    plan_shards,
    probe_tokenizer,
    tokenize_shard,
    work_on_shard,
    work_on_stored_part,
)
from tasks.tokenization.tables import EXAMPLE_SCHEMA, REJECT_SCHEMA, join_batches
from tasks.tokenization.templates import PreparedTokenizer
from tasks.tokenization.token_index import count_indexed, index_part, name_index, read_index, write_index

PARTS = ("train", "eval")
_PART_NAMES = {"train": "training", "eval": "held-out"}


class TokenizationError(ValueError):
    """A dataset of which too little can be trained on; the message says what, the limit and the way out."""


@dataclass(frozen=True)
class TokenCounts:
    """Where every conversation went, and what the training part weighs."""

    rows_train: int
    """Training conversations that became examples."""
    rows_eval: int
    num_examples: int
    """Training examples; more than rows_train where a conversation had to become several."""
    num_eval_examples: int
    trained_tokens: int
    """Tokens with a label, in the training part."""
    total_tokens: int
    rows_rejected: dict[str, int]
    """By reason, over both parts."""
    num_rendered_anew: int = 0
    """Conversations of both parts that had to be rendered one by one; see MaskReport."""
    warnings: tuple[str, ...] = ()
    """What the user should know of how the examples were made, a sentence each."""


def tokenize_dataset(
    dataset: Path,
    prepared: PreparedTokenizer,
    folder: Path,
    config: TokenizationConfig,
    *,
    rows_per_shard: int | None = None,
    tell: Tell = lambda num_done, num_all: None,
) -> TokenCounts:
    """Make the examples of a dataset's two parts, in their rows' order; a table of several files gives as many.

    Args:
        dataset: With train.parquet and eval.parquet (`schemas.records.Conversations`).
        prepared: The tokenizer that will ship; it is saved beside the examples.
        folder: Written; made when missing.
        config: Masks and limits.
        rows_per_shard: A larger part is made in worker processes, shard by shard; None chooses by its size.
        tell: Is told the shards that are done, and all.

    Raises:
        TokenizationError: nothing can be trained on, or too many examples had to be cut or rejected for length.
        TemplateError: the tokenizer does not survive being saved and loaded.
    """
    saved = folder / "tokenizer"
    save_tokenizer(prepared, saved)
    plans = {part: plan_shards(dataset / f"{part}.parquet", rows_per_shard) for part in PARTS}
    shards = {part: [folder / "shards" / part / str(n) for n in range(len(plan))] for part, plan in plans.items()}
    places = [
        (*planned, config_of(part, config), shard)
        for part in PARTS
        for planned, shard in zip(plans[part], shards[part], strict=True)
    ]
    if len(places) == len(PARTS):
        check_saved(prepared, saved, probe(load_tokenizer(saved)))
        for table, row_groups, masks, shard in places:
            tokenize_shard(table, row_groups, prepared, masks, shard)
    else:
        loaded = execution.submit(probe_tokenizer, saved, None)  # which that worker keeps for its shards
        calls = [(place[0], place[1], saved, None, *place[2:]) for place in places]
        execution.map(work_on_shard, calls, parcel=enclose, tell=tell)
        check_saved(prepared, saved, loaded.result())
    counts = join_shards(plans, shards, prepared, folder, config)
    shutil.rmtree(folder / "shards")
    return counts


def tokenize_stored(
    dataset: Path,
    source: str,
    target: str,
    prepared: PreparedTokenizer,
    folder: Path,
    config: TokenizationConfig,
    *,
    tell: Tell = lambda num_done, num_all: None,
) -> TokenCounts:
    """As `tokenize_dataset`, of tables in a store: workers read each part there, and put its examples there.

    Args:
        dataset: its folder, which has the list of what is in the store: both tables are.
        source: address of that folder.
        target: address of the tokens' folder.
        prepared: The tokenizer that will ship; it is saved in the folder.
        folder: Gets all but the tables; made when missing.
        config: Masks and limits.
        tell: Is told the parts that are done, and all.

    Raises:
        TokenizationError: as `tokenize_dataset`.
        TemplateError: the tokenizer does not survive being saved and loaded.
        StoreError: the store cannot be read or written.
    """
    saved = folder / "tokenizer"
    save_tokenizer(prepared, saved)
    files = {
        part: sorted((name, file) for name, file in read_list(dataset).items() if _is_of(name, f"{part}.parquet"))
        for part in PARTS
    }
    calls = [
        (f"{source}/{name}", file, f"{target}/{name}", saved, config_of(part, config), folder / "shards" / name)
        for part in PARTS
        for name, file in files[part]
    ]
    made = execution.map(work_on_stored_part, calls, parcel=enclose_stored_part, tell=tell)
    probes = [loaded for _, loaded in made]
    for loaded in (probes[0], *(other for other in probes if other != probes[0])):
        check_saved(prepared, saved, loaded)
    names = [name for part in PARTS for name, _ in files[part]]
    stored = dict(zip(names, (file for file, _ in made), strict=True))
    own = [name for name, _ in files["train"]]
    if own != ["train.parquet"]:
        indices = (read_index(folder / "shards" / name / INDEX) for name in own)
        write_index(name_index(folder / "train.parquet"), chain.from_iterable(indices))
    reports = {part: MaskReport() for part in PARTS}
    refused: list[Path] = []
    for part in PARTS:
        own = [name for name, _ in files[part]]
        refused += _merge_reports(reports[part], [folder / "shards" / name for name in own])
        num_rows, num_examples = (sum(each[name].num_rows for name in own) for each in (dict(files[part]), stored))
        _check_counts(folder, part, num_rows, num_examples, reports[part])
    write_list(folder, stored)
    pairs = pl.concat([pl.read_ipc((folder / "shards" / name / PAIRS).read_bytes()) for name, _ in files["train"]])
    counts = _finish(reports, refused, pairs, prepared, folder, config)
    shutil.rmtree(folder / "shards")
    return counts


def _is_of(name: str, table: str) -> bool:
    """Tell whether a file is a table, or a part of it."""
    return name == table or name.startswith(f"{table}/")


def _merge_reports(report: MaskReport, shards: Sequence[Path]) -> list[Path]:
    """Add the counts of shards to those of their table; return the files of their rejects."""
    groups = find_groups(shards)
    for group in groups:
        report.merge(read_report(group))
    return [group / REJECTS for group in groups]


def _check_counts(folder: Path, part: str, num_rows: int, num_examples: int, report: MaskReport) -> None:
    """Compare the rows that a table has, and the examples that were written, with those that were counted."""
    found, wanted = report.num_conversations, report.num_examples
    indexed = count_indexed(folder / f"{part}.parquet")
    assert indexed in (None, wanted), f"{folder}: the index of {part} has {indexed} rows of {wanted}"
    assert found == num_rows, f"{folder}: of {num_rows} rows of {part}, {found} were tokenized"
    assert num_examples == wanted, f"{folder}: {part} has {num_examples} examples, and {wanted} were counted"


def config_of(part: str, config: TokenizationConfig) -> TokenizationConfig:
    """Return the masks of a part: held-out labels are the reference answers, and never the prompt."""
    return config.model_copy(update={"train_on_prompt": False}) if part == "eval" else config


def join_shards(
    plans: Mapping[str, Sequence[TableShare]],
    shards: Mapping[str, Sequence[Path]],
    prepared: PreparedTokenizer,
    folder: Path,
    config: TokenizationConfig,
) -> TokenCounts:
    """Put shards together to a tokens folder, whose tables have the files of the dataset's, and judge the whole.

    Args:
        plans: What each shard is made of.
        shards: Folders of each part's shards, in order.
        prepared: The tokenizer.
        folder: Written; there already.
        config: Limits.

    Raises:
        TokenizationError: as `tokenize_dataset`.
    """
    reports = {part: MaskReport() for part in PARTS}
    refused: list[Path] = []
    for part in PARTS:
        files = _sort_by_file(plans[part], shards[part])
        for number, (file, own) in enumerate(files.items()):
            table = folder / f"{part}.parquet"
            if file.parent.name == table.name:
                table.mkdir(exist_ok=True)
                table = name_part(table, number)
            refused += _merge_reports(reports[part], own)
            _take_examples(own, table, is_own=own[0].is_relative_to(folder))
        if part == "train" and (folder / "train.parquet").is_dir():
            write_index(name_index(folder / "train.parquet"), _collect_indices(folder / "train.parquet", files))
        num_rows = sum(count_rows(file) for file in dict.fromkeys(planned.file for planned in plans[part]))
        _check_counts(folder, part, num_rows, count_rows(folder / f"{part}.parquet"), reports[part])
    return _finish(reports, refused, read_pairs(folder / "train.parquet"), prepared, folder, config)


def _finish(
    reports: Mapping[str, MaskReport],
    refused: Sequence[Path],
    pairs: pl.DataFrame,
    prepared: PreparedTokenizer,
    folder: Path,
    config: TokenizationConfig,
) -> TokenCounts:
    """Write what a tokens folder has besides its tables, and judge the whole.

    Raises:
        TokenizationError: as `tokenize_dataset`.
    """
    join_batches(refused, pl.DataFrame(schema=REJECT_SCHEMA).to_arrow().schema, folder / "rejects.parquet")
    # Every trained end of turn ends a generation, not only the one of the template's usual answer.
    trained = reports["train"].endings + reports["eval"].endings
    stops = tuple(dict.fromkeys([*prepared.stop_token_ids, *sorted(trained)]))
    save_stops(prepared, folder / "tokenizer", stops)
    save_prompt_settings(prepared, folder / "tokenizer", allow_special_tokens=config.allow_special_tokens)
    _write_report(folder / "masks.json", prepared, reports, stops, config.max_length)
    train, eval_ = reports["train"], reports["eval"]
    counts = TokenCounts(
        rows_train=train.num_conversations - train.rejected.total(),
        rows_eval=eval_.num_conversations - eval_.rejected.total(),
        num_examples=train.num_examples,
        num_eval_examples=eval_.num_examples,
        trained_tokens=train.trained_tokens,
        total_tokens=train.total_tokens,
        rows_rejected=dict(train.rejected + eval_.rejected),
        num_rendered_anew=train.num_rendered_anew + eval_.num_rendered_anew,
        warnings=(
            *_tell_cuts(reports, config),
            *warn_of_contradictions(pairs),
            *(
                f"{prepared.template_name}, {_PART_NAMES[part]} rows: {warning}"
                for part, report in reports.items()
                for warning in report.warn()
            ),
        ),
    )
    _check_budgets(counts, train, folder / "rejects.parquet", prepared, config)
    return counts


def _collect_indices(table: Path, shards: Mapping[Path, Sequence[Path]]) -> Iterator[Any]:
    """Yield the index of each part: as its worker wrote it, or made here where several shards were joined.

    Args:
        table: of the tokens.
        shards: of each file of the dataset's table, in order.
    """
    for number, own in enumerate(shards.values()):
        if (own[0] / INDEX).is_file():
            yield from read_index(own[0] / INDEX)
        else:
            yield index_part(name_part(table, number))


def _sort_by_file(plan: Sequence[TableShare], shards: Sequence[Path]) -> dict[Path, list[Path]]:
    """Return the shards of each file of a table, in order."""
    found: dict[Path, list[Path]] = {}
    for planned, shard in zip(plan, shards, strict=True):
        found.setdefault(planned.file, []).append(shard)
    return found


def _take_examples(shards: Sequence[Path], table: Path, *, is_own: bool) -> None:
    """Make the shards of one file of the dataset one of the tokens: as it was made, or joined where they are several.

    Args:
        shards: in order.
        table: the file to write.
        is_own: nobody else has the shards.
    """
    made = shards[0] / PART
    if not made.is_file():
        join_batches([group / EXAMPLES for group in find_groups(shards)], EXAMPLE_SCHEMA, table)
    elif is_own:
        made.rename(table)
    else:
        shutil.copyfile(made, table)


def _tell_cuts(reports: Mapping[str, MaskReport], config: TokenizationConfig) -> list[str]:
    """Say how many examples lack a part of their row: what is cut is neither read nor learned."""
    what = "prompts, and answers where those are too long" if config.truncation == "cut_answer" else "their prompts"
    return [
        f"{cut:,} of {report.num_examples:,} {_PART_NAMES[part]} examples had to be cut to "
        f"{config.max_length:,} tokens ({what}): raise tokenization.max_length, where the model has "
        "positions for more, to keep them whole"
        for part, report in reports.items()
        if (cut := report.num_truncated + report.num_rejected_truncated)
    ]


def _write_report(
    path: Path, prepared: PreparedTokenizer, reports: Mapping[str, MaskReport], stops: Sequence[int], max_length: int
) -> None:
    """Write masks.json."""
    report = {
        "template_digest": prepared.template_digest,
        "notes": list(prepared.notes),
        "stop_token_ids": list(stops),
        "max_length": max_length,
        **{part: counted.summary() for part, counted in reports.items()},
    }
    path.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _check_budgets(
    counts: TokenCounts, train: MaskReport, rejects: Path, prepared: PreparedTokenizer, config: TokenizationConfig
) -> None:
    """Refuse a dataset of which too little is left.

    Raises:
        TokenizationError: no training example, none that ends, or more cut or too long than the budget allows.
    """
    reasons = ", ".join(f"{reason}: {number}" for reason, number in Counter(counts.rows_rejected).most_common())
    if not train.num_examples:
        listed = pl.scan_parquet(rejects).head(1).select("source", "line", "detail").collect().rows()
        first = "".join(f" The first: {source}, line {line}: {detail}" for source, line, detail in listed)
        raise TokenizationError(f"no training example is left ({reasons or 'the dataset is empty'}).{first}")
    if not train.num_ending and train.num_truncated < train.num_examples:
        raise TokenizationError(
            f"none of {train.num_examples} training examples ends in a token that ends a generation, so that the model "
            f"would learn never to stop: {prepared.template_name} ends its turns with another token than the "
            "tokenizer's eos_token: set model.chat_template, or eos_token in tokenizer_config.json"
        )
    for_length = train.num_truncated + train.num_rejected_truncated + train.num_too_long
    share = for_length / (train.num_examples + train.num_too_long)
    if share > config.max_truncated_fraction:
        raise TokenizationError(
            f"{for_length} of {train.num_examples + train.num_too_long} training examples ({share:.1%}) had to be cut "
            f"or rejected for length, and tokenization.max_truncated_fraction is {config.max_truncated_fraction:.1%}: "
            f"raise tokenization.max_length ({config.max_length}) where the model has positions for more, shorten or "
            "remove the long rows, or raise the budget"
        )
