"""Parts that are gone, damaged, or cannot be trained on are named."""

import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pytest

from tasks.partitions import name_part
from tasks.stored_files import write_list
from tasks.tokenization.token_index import name_index, read_index, write_index
from tasks.training.indexed_table import lay_out_index
from tasks.training.loop import train_adapter
from tasks.training.records import TrainingError
from tests.tasks.training.parts.token_parts import BUCKET, CONFIG, NUM_PARTS, Stored, damage, write_parts


def test_a_part_that_is_damaged_or_gone_is_named(base_model: Path, tmp_path: Path, stored: Stored) -> None:
    tokens, address, client, _ = stored

    def train(tokens_address: str | None = address) -> None:
        train_adapter(base_model, tokens, tmp_path / "run", CONFIG, seed=5, identity="x", tokens_address=tokens_address)

    with pytest.raises(TrainingError, match=r"train\.parquet/000000\.parquet: the part is missing"):
        train(None)
    damage(client, address, "train.parquet/000009.parquet", lambda content: content[:-1] + b"x")
    with pytest.raises(TrainingError, match=rf"{address}/train\.parquet/000009\.parquet is damaged: its sha256"):
        train()
    damage(client, address, "train.parquet/000009.parquet", lambda content: content[:-1] + b"1")
    client.delete_object(Bucket=BUCKET, Key="run/tokens/train.parquet/000003.parquet")
    with pytest.raises(TrainingError, match=r"000003\.parquet is gone"):
        train()
    assert not list((tmp_path / "run").glob("examples*"))


def test_a_local_part_that_is_cut_short_or_another_one_is_named(base_model: Path, tmp_path: Path) -> None:
    tokens = write_parts(tmp_path / "tokens")
    part = name_part(tokens / "train.parquet", 8)
    content = part.read_bytes()

    def train() -> None:
        train_adapter(base_model, tokens, tmp_path / "run", CONFIG, seed=5, identity="x")

    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingError, match=r"000008\.parquet is damaged or cannot be laid out"):
        train()
    pl.read_parquet(content).head(3).write_parquet(part)
    with pytest.raises(TrainingError, match=r"000008\.parquet is not the part that the index describes \(it has 3 "):
        train()
    part.write_bytes(content)
    name_part(tokens / "train.parquet", 11).unlink()
    with pytest.raises(TrainingError, match=r"it has 11 parts, and its index 12"):
        train()
    name_index(tokens / "train.parquet").write_bytes(b"no index")
    with pytest.raises(TrainingError, match=r"train\.index is damaged"):
        train()


def test_what_cannot_be_trained_on_is_found_without_a_token(tmp_path: Path) -> None:
    tokens = write_parts(tmp_path / "tokens")
    index = name_index(tokens / "train.parquet")
    batches = list(read_index(index))
    changed = pl.DataFrame(batches[3]).with_columns(
        trained=pl.when(pl.int_range(pl.len()) == 2).then(0).otherwise("trained").cast(pl.Int32)
    )
    batches[3] = pa.RecordBatch.from_arrays(
        [column.to_arrow().cast(field.type) for column, field in zip(changed, batches[3].schema, strict=True)],
        schema=batches[3].schema,
    )
    write_index(index, batches)
    shutil.rmtree(tokens / "train.parquet")
    write_list(tokens, {})
    table = tokens / "train.parquet"
    table.mkdir()
    for number in range(NUM_PARTS):
        name_part(table, number).touch()
    with pytest.raises(TrainingError, match=r"row 2 of train\.parquet/000003\.parquet: no trained token"):
        lay_out_index(table, tmp_path / "x", CONFIG, None)
    paired = CONFIG.model_copy(update={"objective": "dpo"})
    with pytest.raises(
        TrainingError, match=r"rows, such as row 0 of train\.parquet/000000\.parquet: no rejected answer"
    ):
        lay_out_index(table, tmp_path / "x", paired, None)
