"""A dataset folder becomes a tokens folder: train.parquet, eval.parquet, rejects.parquet, masks.json, tokenizer/."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from schemas.config import TokenizationConfig
from schemas.records import Rejects
from tasks.models import load_tokenizer
from tasks.tokenization.encoding import encode
from tasks.tokenization.errors import MaskError
from tasks.tokenization.masking import Conversation, Masked, Plan, build_many, finish, plan_many
from tasks.tokenization.rendering import open_chat, plain_messages, render
from tasks.tokenization.reporting import MaskReport
from tasks.tokenization.tables import EXAMPLE_SCHEMA, Row, lay_out, read_rows
from tasks.tokenization.templates import PreparedTokenizer, TemplateError

_MAX_RAW_CHARACTERS = 2000
_REJECT_SCHEMA = {
    "example_id": pl.String,
    "source": pl.String,
    "line": pl.Int64,
    "reason": pl.String,
    "detail": pl.String,
    "raw": pl.String,
}


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


def tokenize_dataset(
    dataset: Path, prepared: PreparedTokenizer, folder: Path, config: TokenizationConfig
) -> TokenCounts:
    """Make the examples of a dataset's two parts, in their rows' order.

    Held-out rows are masked the same, but never with their prompt trained: their labels are the reference answers.

    Args:
        dataset: With train.parquet and eval.parquet (`schemas.records.Conversations`).
        prepared: The tokenizer that will ship; it is saved beside the examples.
        folder: Written; made when missing.
        config: Masks and limits.

    Raises:
        TokenizationError: nothing can be trained on, or too many examples had to be cut or rejected for length.
        TemplateError: the tokenizer does not survive being saved and loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(prepared, folder / "tokenizer")
    train, eval_ = MaskReport(), MaskReport()
    rejects = [
        *_tokenize_part(dataset, "train", prepared, folder, config, train),
        *_tokenize_part(dataset, "eval", prepared, folder, config.model_copy(update={"train_on_prompt": False}), eval_),
    ]
    Rejects.validate(pl.DataFrame(rejects, schema=_REJECT_SCHEMA, orient="row")).write_parquet(
        folder / "rejects.parquet"
    )
    _write_report(folder / "masks.json", prepared, train, eval_)
    rejected = train.rejected + eval_.rejected
    counts = TokenCounts(
        rows_train=train.num_conversations - train.rejected.total(),
        rows_eval=eval_.num_conversations - eval_.rejected.total(),
        num_examples=train.num_examples,
        num_eval_examples=eval_.num_examples,
        trained_tokens=train.trained_tokens,
        total_tokens=train.total_tokens,
        rows_rejected=dict(rejected),
    )
    assert len(rejects) == rejected.total()
    _check_budgets(counts, train, rejects, config)
    return counts


def _tokenize_part(
    dataset: Path,
    part: str,
    prepared: PreparedTokenizer,
    folder: Path,
    config: TokenizationConfig,
    report: MaskReport,
) -> list[tuple[Any, ...]]:
    """Write one part's examples; return its rejects.

    One thread renders a batch while another encodes the one before: encoding leaves Python to Rust.
    """
    tokenizer = prepared.tokenizer
    rejects: list[tuple[Any, ...]] = []
    with pq.ParquetWriter(folder / f"{part}.parquet", EXAMPLE_SCHEMA) as writer, ThreadPoolExecutor(1) as pool:

        def write(rows: Sequence[Row], pending: "Future[list[Masked | MaskError]]") -> None:
            outcomes = _retry_adapted(rows, pending.result(), prepared, config, report)
            report.add(outcomes, prepared)
            writer.write_table(lay_out(rows, outcomes, prepared))
            for row, outcome in zip(rows, outcomes, strict=True):
                if isinstance(outcome, MaskError):
                    place = (row.example_id, row.source, row.line)
                    rejects.append((*place, outcome.reason, str(outcome), row.raw[:_MAX_RAW_CHARACTERS]))

        waiting: tuple[list[Row], Future[list[Masked | MaskError]]] | None = None
        for rows in read_rows(dataset / f"{part}.parquet"):
            plans: list[Plan | MaskError] = plan_many([row.conversation for row in rows], tokenizer, config)
            pending = pool.submit(finish, plans, tokenizer, config)
            if waiting:
                write(*waiting)
            waiting = (rows, pending)
        if waiting:
            write(*waiting)
    return rejects


def _retry_adapted(
    rows: Sequence[Row],
    outcomes: Sequence[Masked | MaskError],
    prepared: PreparedTokenizer,
    config: TokenizationConfig,
    report: MaskReport,
) -> list[Masked | MaskError]:
    """Give a template that refuses tool calls an empty content or arguments as JSON text, which some expect."""
    settled = list(outcomes)
    for number, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        if not isinstance(outcome, MaskError) or outcome.reason not in ("template_error", "null_content"):
            continue
        for as_text in (False, True):
            messages = [_adapt(message, as_text) for message in row.conversation.messages]
            if messages == row.conversation.messages:
                continue
            again = build_many([Conversation(messages, row.conversation.tools)], prepared.tokenizer, config)[0]
            if isinstance(again, Masked):
                settled[number] = again
                report.num_adapted += 1
                break
    return settled


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


def _save_tokenizer(prepared: PreparedTokenizer, folder: Path) -> None:
    """Save the tokenizer, and prove that what loads from there gives the same prompts."""
    prepared.tokenizer.save_pretrained(str(folder))
    stops = {"eos_token_id": list(prepared.stop_token_ids), "pad_token_id": prepared.tokenizer.pad_token_id}
    if prepared.tokenizer.bos_token_id is not None:
        stops["bos_token_id"] = prepared.tokenizer.bos_token_id
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n", encoding="utf-8")
    loaded = load_tokenizer(folder)
    probe = plain_messages([{"role": "user", "content": " Ein Beispiel,\n\n  例子 🙂 1234 "}])
    texts = [str(probe[0]["content"])]
    try:
        texts.append(render(open_chat(prepared.tokenizer), probe, None, add_generation_prompt=True))
        again = render(open_chat(loaded), probe, None, add_generation_prompt=True)
    except MaskError:
        again = texts[-1]
    if again != texts[-1] or any(encode(loaded, text) != encode(prepared.tokenizer, text) for text in texts):
        raise TemplateError(
            f"{folder}: the tokenizer gives other ids after being saved and loaded: its folder lacks config.json or "
            "tokenizer.json, so that another tokenizer class is chosen; add the model's config.json"
        )


def _write_report(path: Path, prepared: PreparedTokenizer, train: MaskReport, eval_: MaskReport) -> None:
    """Write masks.json."""
    report = {
        "template_digest": prepared.template_digest,
        "notes": list(prepared.notes),
        "stop_token_ids": list(prepared.stop_token_ids),
        "train": train.summary(),
        "eval": eval_.summary(),
    }
    path.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _check_budgets(
    counts: TokenCounts, train: MaskReport, rejects: Sequence[tuple[Any, ...]], config: TokenizationConfig
) -> None:
    """Refuse a dataset of which too little is left.

    Raises:
        TokenizationError: no training example, or more cut or too long than the budget allows.
    """
    reasons = ", ".join(f"{reason}: {number}" for reason, number in Counter(counts.rows_rejected).most_common())
    if not train.num_examples:
        first = f" The first: {rejects[0][1]}, line {rejects[0][2]}: {rejects[0][4]}" if rejects else ""
        raise TokenizationError(f"no training example is left ({reasons or 'the dataset is empty'}).{first}")
    for_length = train.num_truncated + train.num_too_long
    share = for_length / (train.num_examples + train.num_too_long)
    if share > config.max_truncated_fraction:
        raise TokenizationError(
            f"{for_length} of {train.num_examples + train.num_too_long} training examples ({share:.1%}) had to be cut "
            f"or rejected for length, and tokenization.max_truncated_fraction is {config.max_truncated_fraction:.1%}: "
            f"raise tokenization.max_length ({config.max_length}) or the budget"
        )
