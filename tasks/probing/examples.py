"""Further held-out sets as examples: rows that the new model must still do as well as the base model."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import polars as pl
from transformers import PreTrainedTokenizerBase

from schemas.config import DataConfig, ProbeConfig, TokenizationConfig
from tasks import storage
from tasks.ingestion.dataset import build_dataset
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.templates import PreparedTokenizer

PARTS = ("train", "eval")


class ProbeError(ValueError):
    """A further held-out set cannot be asked; the message names it, what is wrong and the way out."""


@dataclass(frozen=True)
class ProbeExamples:
    """Examples of one set, and where its rows went."""

    examples: pl.DataFrame
    """As eval.parquet of the tokens."""
    warnings: tuple[str, ...]


def data_of(probe: ProbeConfig) -> DataConfig:
    """Return how the rows of a probe are read. The split is undone afterwards: all of them are asked."""
    fields = probe.model_dump(include={"source", "format", "columns", "ignored_columns", "subset", "split", "revision"})
    return DataConfig(**fields, eval_fraction=0.5, max_rejected_fraction=1.0)


def make_examples(
    probe: ProbeConfig,
    data: DataConfig,
    prepared: PreparedTokenizer,
    config: TokenizationConfig,
    trained: Collection[str],
    *,
    seed: int,
) -> ProbeExamples:
    """Read a probe and make its examples.

    Args:
        probe: which, how, and how many rows.
        data: `data_of` it, with local paths.
        prepared: the tokenizer that ships.
        config: lengths, as of the run.
        trained: example_ids of the run's training rows: these are no test of what was forgotten.
        seed: of the run.

    Raises:
        ProbeError: no row is left.
    """
    with storage.new_folder() as folder:
        counts = build_dataset(data, seed=seed, folder=folder / "dataset")
        chats = pl.concat([pl.read_parquet(folder / "dataset" / f"{part}.parquet") for part in PARTS])
        known = chats["example_id"].is_in(list(trained))
        if probe.as_text:
            examples = continue_texts(chats, prepared.tokenizer, config.max_length)
        else:
            masks = config.model_copy(update={"max_truncated_fraction": 1.0, "train_on_prompt": False})
            tokenize_dataset(folder / "dataset", prepared, folder / "tokens", masks)
            examples = pl.concat([pl.read_parquet(folder / "tokens" / f"{part}.parquet") for part in PARTS])
    num_made = examples["example_id"].n_unique()
    examples = examples.filter(~pl.col("example_id").is_in(list(trained)))
    # Digests are a draw that nobody chose, and the same one each time.
    examples = examples.sort("example_id", maintain_order=True).unique("example_id", keep="last", maintain_order=True)
    lost = {
        "rejected": sum(counts.rows_rejected.values()),
        "duplicates": counts.rows_duplicate,
        "too long or without an answer to ask for": chats.height - num_made,
        "also trained on in this run": int(known.sum()),
    }
    told = ", ".join(f"{count:,} {why}" for why, count in lost.items() if count)
    if examples.is_empty():
        where = f"evaluation.probes {probe.name} ({probe.source})"
        raise ProbeError(f"{where}: no row is left to ask ({told or 'none was read'}): give other rows")
    warnings = (f"probe {probe.name}: of {counts.rows_read:,} rows {told} are not asked",) if told else ()
    return ProbeExamples(examples.head(probe.max_examples), warnings)


def continue_texts(chats: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int) -> pl.DataFrame:
    """Make examples of running text: what stands before the last answer is given, and the answer is to follow.

    A token that reaches over the border belongs to the answer. Rows longer than the limit are left out, and those of
    which nothing is given.

    Args:
        chats: Conversations.
        tokenizer: a fast one, for its offsets.
        max_length: in tokens.
    """
    rows = []
    for example, text in chats.select("example_id", "messages").iter_rows():
        messages: list[dict[str, Any]] = json.loads(text)
        *before, last = messages
        given = "".join(message.get("content") or "" for message in before)
        encoded = tokenizer(given + last["content"], return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        start = next((at for at, (_, end) in enumerate(offsets) if end > len(given)), len(ids))
        if 0 < start < len(ids) <= max_length:
            rows.append(
                {
                    "example_id": example,
                    "question": given,
                    "reference": last["content"],
                    "input_ids": ids,
                    "labels": [-100] * start + ids[start:],
                }
            )
    lists = {"input_ids": pl.List(pl.Int32), "labels": pl.List(pl.Int32)}
    return pl.DataFrame(rows, schema={"example_id": pl.String, "question": pl.String, "reference": pl.String, **lists})
