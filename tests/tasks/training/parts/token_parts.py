"""A tokens folder in parts, and what everything in memory makes of it."""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from schemas.config import TrainingConfig
from tasks.partitions import name_part
from tasks.stored_files import put_file, write_list
from tasks.tokenization.token_index import index_part, name_index, write_index
from tasks.training.batches import Batch
from tasks.training.indexed_table import lay_out_index, open_indexed
from tasks.training.micro_batches import form_flat_step, iterate_steps
from tasks.training.order import RowParts, count_parts_per_window
from tasks.training.records import StepRecord
from tasks.training.rows import choose_pack_tokens, count_group
from tasks.training.table_writer import write_examples, write_packs
from tasks.training.token_table import Packs, TokenTable, open_packs, open_table
from tests.object_store import Traffic
from tests.tasks.training.conftest import draw_examples, write_split

CONFIG = TrainingConfig(
    rank=4, alpha=8, learning_rate=1e-2, micro_batch=4, gradient_accumulation_steps=2, num_epochs=1,
    checkpoint_every_steps=8, eval_every_steps=50, precision="fp32",
)  # fmt: skip
NUM_PARTS, PART_ROWS = 12, 20
NUM_STEPS = 28
"""Of an epoch of 222 rows."""
GROUPS_PER_WINDOW = 60
"""240 rows are four windows of three parts."""
BUCKET = "tokens"


class Stored(NamedTuple):
    """A tokens folder whose parts are in a bucket only."""

    tokens: Path
    address: str
    """Of the tokens folder in the bucket."""
    client: Any
    """Of the bucket."""
    traffic: Traffic
    """How often each part was asked for."""


NO_TRAFFIC = Traffic("nothing")


def store_parts(tokens: Path, client: Any, traffic: Traffic = NO_TRAFFIC) -> Stored:
    """Move the parts of a table into the bucket, as workers would have put them there."""
    address = f"s3://{BUCKET}/run/tokens"
    names = [f"train.parquet/{number:06}.parquet" for number in range(NUM_PARTS)]
    write_list(tokens, {name: put_file(tokens / name, f"{address}/{name}", 20) for name in names})
    shutil.rmtree(tokens / "train.parquet")
    return Stored(tokens, address, client, traffic)


def write_parts(folder: Path, *, is_paired: bool = False, weighs: bool = False) -> Path:
    """Write a tokens folder whose table has NUM_PARTS parts, of 18 to 23 rows, one of them empty, and its index."""
    table = folder / "train.parquet"
    table.mkdir(parents=True)
    for number in range(NUM_PARTS):
        part, count = name_part(table, number), 0 if number == 5 else PART_ROWS - 2 + number % 6
        write_split(part, draw_examples(count, seed=number), prefix=f"part-{number}")
        columns = pq.read_table(part)
        lists = pa.list_(pa.int32())
        if is_paired:
            others = [(ids[: start + 2], start) for ids, start in draw_examples(count, seed=number)]
            columns = columns.append_column("rejected_ids", pa.array([ids[::-1] for ids, _ in others], lists))
            labels = [[-100] * start + ids[::-1][start:] for ids, start in others]
            columns = columns.append_column("rejected_labels", pa.array(labels, lists))
        if weighs:
            values = [
                [0.25 * (place % 3) for place in range(len(ids))] if row % 3 and number % 2 else None
                for row, ids in enumerate(columns["input_ids"].to_pylist())
            ]
            columns = columns.append_column("weights", pa.array(values, pa.list_(pa.float32())))
        pq.write_table(columns, part, row_group_size=7)
    write_split(folder / "eval.parquet", draw_examples(6, seed=99), prefix="eval")
    if is_paired:
        shutil.copyfile(name_part(table, 0), folder / "eval.parquet")
    write_index(name_index(table), (index_part(name_part(table, number)) for number in range(NUM_PARTS)))
    return folder


def open_lazily(
    tokens: Path, folder: Path, config: TrainingConfig, address: str | None = None
) -> tuple[TokenTable, Packs]:
    lay_out_index(tokens / "train.parquet", folder / "index", config, address)
    return open_indexed(tokens / "train.parquet", folder / "index", folder / "parts", config, address)


def open_whole(
    table: Path, folder: Path, place: Path, config: TrainingConfig, address: str | None = None
) -> tuple[TokenTable, Packs]:
    """The oracle: every token in memory, packed part by part."""
    group, whole = count_group(config), place / "whole"
    write_examples(table, whole, pairs=config.is_paired)
    found = open_table(whole, group=group)
    parts = np.cumsum([0, *(pq.read_metadata(name_part(table, number)).num_rows for number in range(NUM_PARTS))])
    budget = choose_pack_tokens(found.group_lengths, config) if config.packing else None
    rows = np.asarray(write_packs(whole, budget, group=group, parts=parts))
    opened = open_packs(whole, RowParts(rows, count_parts_per_window(len(found.group_lengths), NUM_PARTS)))
    return found, opened


def list_steps(
    found: tuple[TokenTable, Packs], config: TrainingConfig, turn: tuple[int, int] = (0, 1)
) -> list[list[Batch]]:
    table, rows = found
    num_steps = 2 * -(-len(rows) // config.rows_per_step)
    form = partial(form_flat_step, tokens_per_forward=64) if config.is_paired else None
    return list(iterate_steps(table, rows, config, seed=5, first=0, last=num_steps, turn=turn, form_step=form))


def describe(batches: Sequence[Batch]) -> list[Any]:
    """All that a batch says, as values that can be compared; of others' only the counts."""
    return [
        [
            batch.input_ids.tolist(), batch.targets.tolist(), None if batch.weights is None else batch.weights.tolist(),
            batch.example_ids, batch.num_tokens, batch.num_trained_tokens, batch.total_weight, batch.dropout_key,
        ]
        if not batch.is_elsewhere
        else [batch.num_tokens, batch.num_trained_tokens, batch.total_weight, len(batch.example_ids)]
        for batch in batches
    ]  # fmt: skip


def note(losses: list[float], record: StepRecord) -> None:
    losses.append(record.loss)


def damage(client: Any, address: str, name: str, change: Callable[[bytes], bytes]) -> None:
    key = f"{address.partition('://')[2].partition('/')[2]}/{name}"
    content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=key, Body=change(content))
