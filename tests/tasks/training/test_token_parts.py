"""Parts that are read when needed give what everything in memory gives, and no more of them is fetched or kept."""

import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from schemas.config import TrainingConfig
from tasks.partitions import name_part
from tasks.stored_files import put_file, write_list
from tasks.tokenization.token_index import index_part, name_index, read_index, write_index
from tasks.training import order, preparation, step_plans
from tasks.training.batches import Batch, choose_pack_tokens, count_group, form_flat_step, iterate_steps
from tasks.training.checkpoints import Progress
from tasks.training.indexed_table import lay_out_index, open_indexed
from tasks.training.loop import train_adapter
from tasks.training.order import RowParts, count_parts_per_window
from tasks.training.place import open_place
from tasks.training.preparation import prepare_training
from tasks.training.process.messages import TrainingJob
from tasks.training.process.team import find_offer, leading, prepare_job, take_offer
from tasks.training.records import StepRecord, TrainingError, TrainingStopped
from tasks.training.steps import Run, do_step, iterate
from tasks.training.token_parts import PartCounts
from tasks.training.token_table import Packs, TokenTable, open_packs, open_table, write_examples, write_packs
from tests.object_store import KEYS, serve_bucket
from tests.tasks.training.conftest import draw_examples, write_split
from tests.tasks.training.ranks import find_port, on_two_ranks

CONFIG = TrainingConfig(
    rank=4, alpha=8, learning_rate=1e-2, micro_batch=4, gradient_accumulation_steps=2, num_epochs=1,
    checkpoint_every_steps=8, eval_every_steps=50, precision="fp32",
)  # fmt: skip
NUM_PARTS, PART_ROWS = 12, 20
NUM_STEPS = 28
"""Of an epoch of 222 rows."""
BUCKET = "tokens"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """240 rows are four windows of three parts."""
    monkeypatch.setattr(order, "GROUPS_PER_WINDOW", 60)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


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


CASES: list[dict[str, Any]] = [
    {"packing": True, "tokens_per_pack": 64},
    {"packing": False},
    {"packing": True, "weighs": True},
    {"packing": False, "weighs": True},
    {"packing": False, "objective": "dpo"},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turn", [(0, 1), (1, 2), (2, 3)])
def test_batches_are_those_of_everything_in_memory(tmp_path: Path, case: dict[str, Any], turn: tuple[int, int]) -> None:
    settings = {name: value for name, value in case.items() if name != "weighs"}
    config = TrainingConfig.model_validate({**CONFIG.model_dump(), **settings})
    tokens = write_parts(tmp_path / "tokens", is_paired=config.is_paired, weighs="weighs" in case)
    lazy = open_lazily(tokens, tmp_path / "lazy", config)
    whole = open_whole(tokens / "train.parquet", tmp_path, tmp_path, config)
    assert list(lazy[1]) == list(whole[1])
    assert lazy[0].find_highest() == whole[0].find_highest()
    assert lazy[0].trained.tolist() == whole[0].trained.tolist()
    steps, expected = (list_steps(found, config, turn) for found in (lazy, whole))
    assert [describe(step) for step in steps] == [describe(step) for step in expected]
    assert any(batch.is_elsewhere for step in steps for batch in step) == (turn[1] > 1)
    lazy[0].parts.close()
    assert not (tmp_path / "lazy" / "parts").exists()


@pytest.mark.parametrize("weighs", [False, True])
def test_ranks_together_form_every_row_once_and_know_the_sums(tmp_path: Path, weighs: bool) -> None:
    config = CONFIG.model_copy(update={"packing": True, "tokens_per_pack": 64})
    tokens = write_parts(tmp_path / "tokens", weighs=weighs)
    alone = list_steps(open_lazily(tokens, tmp_path / "alone", config), config)
    for count in (2, 3):
        ranks = [
            list_steps(open_lazily(tokens, tmp_path / f"{count}-{number}", config), config, (number, count))
            for number in range(count)
        ]
        for whole, *shares in zip(alone, *ranks, strict=True):
            names = sorted(name for batch in whole for name in batch.example_ids)
            own = [[batch for batch in share if not batch.is_elsewhere] for share in shares]
            if all(len(each) < len(share) for each, share in zip(own, shares, strict=True)):
                assert sorted(name for each in own for batch in each for name in batch.example_ids) == names
                assert len({batch.dropout_key for each in own for batch in each}) == sum(map(len, own))
            else:  # the few rows that end an epoch are formed by every rank
                assert all(sorted(name for batch in each for name in batch.example_ids) == names for each in own)
            for share in shares:
                for counted in ("num_tokens", "num_trained_tokens", "total_weight"):
                    sums = [sum(getattr(batch, counted) for batch in batches) for batches in (whole, share)]
                    assert sums[0] == pytest.approx(sums[1], rel=1e-12)


def test_a_rank_holds_few_parts_and_its_disk_as_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_plans, "MOST_PARTS", 4)
    monkeypatch.setattr(step_plans, "STEPS_AHEAD", 4)
    tokens = write_parts(tmp_path / "tokens")
    table, rows = open_lazily(tokens, tmp_path, CONFIG)
    on_disk = []
    for _ in iterate_steps(table, rows, CONFIG, seed=5, first=0, last=-(-len(rows) // 8)):
        on_disk.append(len(list((tmp_path / "parts").glob("*/made"))))
    counts: PartCounts = table.parts.counts
    assert counts.numbers == set(range(NUM_PARTS)) - {5}
    # A step at the border of two windows has parts of both: six.
    assert 3 <= counts.most_at_once <= 6
    assert max(on_disk) <= 6
    assert counts.laid_out <= NUM_PARTS  # the first once more, for the trial before the first step
    assert not list((tmp_path / "parts").glob("*/made"))


def _note(losses: list[float], record: StepRecord) -> None:
    losses.append(record.loss)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_losses_are_those_of_everything_in_memory(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: Any
) -> None:
    tokens = write_parts(tmp_path / "tokens", is_paired=objective == "dpo")
    config = CONFIG.model_copy(update={"objective": objective})
    told = {}
    for name in ("lazy", "whole"):
        with monkeypatch.context() as patch:
            if name == "whole":
                patch.setattr(preparation, "open_indexed", open_whole)
            losses: list[float] = []
            outcome = train_adapter(
                base_model, tokens, tmp_path / name, config, seed=5, identity="x",
                on_step=partial(_note, losses),
            )  # fmt: skip
        told[name] = (losses, load_file(outcome.adapter / "adapter_model.safetensors"), outcome.num_packs)
    assert told["lazy"][0] == pytest.approx(told["whole"][0], abs=1e-6 if objective == "dpo" else 0)
    assert len(told["lazy"][0]) == NUM_STEPS
    assert told["lazy"][2] == told["whole"][2]
    for key, value in told["whole"][1].items():
        torch.testing.assert_close(told["lazy"][1][key], value, rtol=0, atol=1e-5 if objective == "dpo" else 0)
    assert not list((tmp_path / "lazy").glob("examples*"))


def test_a_stopped_training_goes_on_to_the_same_adapter(
    base_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, losses = write_parts(tmp_path / "tokens"), list[float]()

    def train(name: str, stop_at: int) -> Any:
        return train_adapter(
            base_model, tokens, tmp_path / name, CONFIG, seed=5, identity="x",
            on_step=lambda record: losses.append(record.loss), should_stop=lambda: len(losses) == stop_at,
        )  # fmt: skip

    whole = load_file(train("whole", 1000).adapter / "adapter_model.safetensors")
    expected, losses[:] = losses.copy(), []
    with suppress(TrainingStopped):
        train("stopped", 11)
    assert not list((tmp_path / "stopped").glob("examples*"))
    with caplog.at_level(logging.INFO):
        rest = load_file(train("stopped", 1000).adapter / "adapter_model.safetensors")
    assert losses == expected
    assert all(torch.equal(rest[name], value) for name, value in whole.items())
    assert re.search(r"Of the 12 parts of the tokens \d+ were used, .* 0 were fetched \(0\.0 MB\)", caplog.text)


class _Gets(logging.Handler):
    """The objects that were asked for, in place of the server's log."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        log = logging.getLogger("werkzeug")
        log.handlers, log.propagate = [self], False
        log.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"GET /\S*?(\d{6}\.parquet)\S* HTTP", record.getMessage())
        if found is not None:
            self.counts[found[1]] += 1


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[Path, str, Any]]:
    """A tokens folder whose parts are in a bucket only, its address, and the bucket's client."""
    tokens = write_parts(tmp_path / "stored")
    with serve_bucket(BUCKET) as client:
        address = f"s3://{BUCKET}/run/tokens"
        names = [f"train.parquet/{number:06}.parquet" for number in range(NUM_PARTS)]
        write_list(tokens, {name: put_file(tokens / name, f"{address}/{name}", 20) for name in names})
        shutil.rmtree(tokens / "train.parquet")
        yield tokens, address, client


def do_steps(
    number: int, base_model: Path, tokens: Path, folder: Path, address: str, endpoint: str, num_steps: int
) -> tuple[list[float], PartCounts, int]:
    """Do steps as the only rank of one of two machines; return losses, what of the parts was read, and work counted."""
    order.GROUPS_PER_WINDOW = 60
    os.environ.update({**KEYS, "AWS_ENDPOINT_URL": endpoint, "LOCAL_RANK": "0", "GROUP_RANK": str(number)})
    place = folder / f"machine-{number}"
    setup = prepare_training(base_model, tokens, place, CONFIG, seed=5, tokens_address=address)
    run = Run(setup, Progress(), "x")
    steps, losses, tokens_seen = iterate(run), [], 0
    for _ in range(num_steps):
        record, steps = do_step(run, steps)
        losses.append(record.loss)
        tokens_seen += record.num_tokens
    steps.close()  # type: ignore[attr-defined]
    setup.table.parts.close()
    return losses, setup.table.parts.counts, tokens_seen


def test_two_ranks_fetch_the_parts_of_their_own_batches_only(
    base_model: Path, tmp_path: Path, stored: tuple[Path, str, Any]
) -> None:
    tokens, address, _ = stored
    endpoint, requests = os.environ["AWS_ENDPOINT_URL"], _Gets()
    alone = do_steps(0, base_model, tokens, tmp_path / "alone", address, endpoint, NUM_STEPS)
    (tmp_path / "two").mkdir()
    once = requests.counts.copy()
    assert set(once.values()) <= {1, 2}  # the first part once more: the trial reads it before the first step
    assert alone[1].fetched == sum(once.values())
    requests.counts.clear()
    given = (base_model, tokens, tmp_path / "two", address, endpoint, NUM_STEPS)
    ranks = on_two_ranks(do_steps, *given, folder=tmp_path / "ranks")
    for losses, counts, num_tokens in ranks:
        assert losses == pytest.approx(alone[0], abs=1e-5)
        assert num_tokens == alone[2]
        assert counts.fetched == counts.laid_out
    assert sum(requests.counts.values()) == sum(counts.fetched for _, counts, _ in ranks)
    # Eleven parts have rows. Of a window's three, a rank with half of the lanes reads two or, at the border, all.
    assert set.union(*(counts.numbers for _, counts, _ in ranks)) == set(range(NUM_PARTS)) - {5}
    assert sum(len(counts.numbers) for _, counts, _ in ranks) < 2 * 11
    assert sum(counts.fetched_bytes for _, counts, _ in ranks) < 1.7 * alone[1].fetched_bytes


def train_divided(number: int, base_model: Path, tokens: Path, folder: Path) -> list[float]:
    """Train with passes that are collectives; return the losses."""
    order.GROUPS_PER_WINDOW = 60
    config, losses = CONFIG.model_copy(update={"strategy": "fsdp", "max_steps": 10}), list[float]()
    train_adapter(
        base_model, tokens, folder, config, seed=5, identity="x",
        on_step=lambda record: losses.append(record.loss),
    )  # fmt: skip
    return losses


def test_ranks_that_gather_weights_do_as_many_passes(base_model: Path, tmp_path: Path) -> None:
    tokens, losses = write_parts(tmp_path / "tokens"), list[float]()
    config = CONFIG.model_copy(update={"max_steps": 10})
    train_adapter(base_model, tokens, tmp_path / "alone", config, seed=5, identity="x", on_step=partial(_note, losses))
    for found in on_two_ranks(train_divided, base_model, tokens, tmp_path / "two", folder=tmp_path / "ranks"):
        assert found == pytest.approx(losses, abs=1e-5)
    assert not list((tmp_path / "two").glob("examples*"))


def test_in_few_steps_only_the_parts_of_a_window_are_fetched(
    base_model: Path, tmp_path: Path, stored: tuple[Path, str, Any]
) -> None:
    tokens, address, _ = stored
    config = CONFIG.model_copy(update={"max_steps": 5})
    requests = _Gets()
    train_adapter(base_model, tokens, tmp_path / "run", config, seed=5, identity="x", tokens_address=address)
    assert len(requests.counts) <= 4  # three of the window, and the first, by which the engine is tried out


def damage(client: Any, address: str, name: str, change: Callable[[bytes], bytes]) -> None:
    key = f"{address.partition('://')[2].partition('/')[2]}/{name}"
    content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=key, Body=change(content))


def test_a_part_that_is_damaged_or_gone_is_named(
    base_model: Path, tmp_path: Path, stored: tuple[Path, str, Any]
) -> None:
    tokens, address, client = stored

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


def test_a_machine_that_joins_leaves_the_parts_where_they_are(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that machines share: it reads there those that its batches need."""
    tokens, shared = write_parts(tmp_path / "tokens"), tmp_path / "shared"
    monkeypatch.setenv("SFT_TEAM", str(shared))
    monkeypatch.setenv("SFT_RENDEZVOUS", f"127.0.0.1:{find_port()}")
    config = CONFIG.model_copy(update={"num_nodes": 2})
    place = open_place(str(shared))
    with leading(prepare_job(TrainingJob(base_model, tokens, tmp_path / "run", config, 5, "x"))):
        offer = find_offer(place)
        assert offer is not None
        for _ in range(2):  # and when it joins again
            job = take_offer(place, offer, tmp_path / "guest")
            assert (job.tokens / "eval.parquet").is_file()
            assert not (job.tokens / "train.parquet").exists()
    assert job.tokens_address is not None
    found = open_lazily(job.tokens, tmp_path / "there", config, job.tokens_address)
    expected = list_steps(open_lazily(tokens, tmp_path / "here", config), config)
    assert [describe(step) for step in list_steps(found, config)] == [describe(step) for step in expected]
    part = Path(job.tokens_address) / "train.parquet" / "000004.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(TrainingError, match=rf"{part} is damaged: its sha256 is not"):
        list_steps(open_lazily(job.tokens, tmp_path / "damaged", config, job.tokens_address), config)


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
