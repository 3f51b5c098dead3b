import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import DataConfig, DatasetConfig
from tasks.ingestion import tables
from tasks.ingestion.counts import DatasetCounts
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError
from tasks.ingestion.rows.identity import UsableRow, make_conversation
from tasks.ingestion.splitting import order
from tasks.ingestion.splitting.mixture import take
from tasks.ingestion.splitting.order import write_tables
from tasks.partitions import list_parts
from tests.tasks.ingestion.conftest import WriteLines, write_index


def ask(name: str, number: int) -> dict[str, Any]:
    return {"prompt": f"{name} {number}", "completion": f"answer {number}"}


def make_rows(name: str, num_rows: int) -> list[UsableRow]:
    texts = [
        ({"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": "x"}) for n in range(num_rows)
    ]
    return [make_conversation(list(messages), None, name, line) for line, messages in enumerate(texts, start=1)]


def build(folder: Path, *, seed: int = 0, **settings: Any) -> DatasetCounts:
    return build_dataset(DataConfig.model_validate(settings), seed=seed, folder=folder)


def read(folder: Path, side: str) -> list[tuple[str, int]]:
    return pl.read_parquet(folder / f"{side}.parquet").select("source", "line").rows()


def read_quality(folder: Path) -> Any:
    return json.loads((folder / "quality.json").read_text(encoding="utf-8"))


def count_taken(size: int, seed: int = 0, **amount: Any) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        index = write_index(Path(folder), make_rows("x", size))
        return take(index, np.ones(size, dtype=np.bool_), DatasetConfig(source="x", **amount), seed).tolist()


def list_written(folder: Path, *sizes: int, repeats: list[int], seed: int = 0) -> list[tuple[str, int]]:
    """Return source and line of each row that is written, of datasets of some sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets = [make_rows("ab"[number], size) for number, size in enumerate(sizes)]
    index = write_index(folder, *datasets, rows_per_piece=30, seed=seed)
    table = folder / "tables.parquet"
    write_tables(index, {table: np.array(repeats, dtype=np.uint8)}, folder / "scratch")
    return [row for part in list_parts(table) for row in pl.read_parquet(part).select("source", "line").iter_rows()]


def find_taken(size: int, seed: int = 0, **amount: Any) -> set[int]:
    return set(np.flatnonzero(count_taken(size, seed, **amount)).tolist())


def test_weight_one_takes_every_row_once() -> None:
    assert count_taken(10) == [1] * 10


def test_weight_below_one_takes_a_seeded_part_and_a_larger_weight_takes_more_to_it() -> None:
    half, most = find_taken(40, weight=0.5), find_taken(40, weight=0.8)
    assert (len(half), len(most)) == (20, 32)
    assert max(count_taken(40, weight=0.8)) == 1
    assert half < most
    assert find_taken(40, seed=1, weight=0.5) != half
    assert len(find_taken(40, weight=0.001)) == 1


def test_weight_above_one_repeats_every_row_and_a_seeded_part_once_more() -> None:
    assert sorted(count_taken(10, weight=2.3)) == [2] * 7 + [3] * 3
    assert count_taken(3, weight=2) == [2, 2, 2]


def test_number_of_rows_is_exact_or_refused() -> None:
    assert sorted(count_taken(10, num_rows=7)) == [0] * 3 + [1] * 7
    assert count_taken(10, num_rows=10) == [1] * 10
    with pytest.raises(DataError, match=r"x: num_rows is 11, and 10 training rows are left .*at most 10.*a weight"):
        count_taken(10, num_rows=11)
    with pytest.raises(DataError, match="num_rows is 1, and 0 training rows"):
        count_taken(0, num_rows=1)


def test_mixed_rows_keep_their_number_and_every_dataset_is_in_the_front(tmp_path: Path) -> None:
    repeats = [1] * 100 + [2] * 100
    mixed = list_written(tmp_path, 100, 100, repeats=repeats)
    assert Counter(mixed) == {("a", n): 1 for n in range(1, 101)} | {("b", n): 2 for n in range(1, 101)}
    assert 10 <= sum(source == "a" for source, _ in mixed[:60]) <= 30
    assert list_written(tmp_path, 100, 100, repeats=repeats, seed=1) != mixed


def test_rows_come_in_one_order_whatever_the_parts_and_how_many_are_scattered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sizes in ((90, 60), (150, 0)):  # mixed, and as they are
        folder = tmp_path / str(sizes[1])
        whole = list_written(folder, *sizes, repeats=[1, 2, 0] * 50)
        with monkeypatch.context() as patch:
            patch.setattr(tables, "GROUP_ROWS", 11)
            for scattered_rows in (10_000, 40, 1):
                patch.setattr(order, "SCATTERED_ROWS", scattered_rows)
                assert list_written(folder / str(scattered_rows), *sizes, repeats=[1, 2, 0] * 50) == whole
        parts = [pl.read_parquet(part).height for part in list_parts(folder / "1" / "tables.parquet")]
        assert parts == [11] * 13 + [7]


def test_one_dataset_keeps_its_order(tmp_path: Path) -> None:
    lines = [line for _, line in list_written(tmp_path, 4, 2, repeats=[1, 0, 3, 1, 0, 0])]
    assert lines == [1, 3, 3, 3, 4]


def test_mixture_of_three_is_accounted_for_row_by_row(tmp_path: Path, write_lines: WriteLines) -> None:
    a = write_lines("a/rows.jsonl", [ask("a", number) for number in range(100)])
    b = write_lines("b/rows.jsonl", [*(ask("b", number) for number in range(50)), ask("b", 0), "{"])
    c = write_lines("c.jsonl", [{"q": f"c {number}", "r": "x"} for number in range(200)])
    mixture = [
        {"source": str(b), "weight": 2},
        {"source": str(c), "num_rows": 30, "format": "alpaca", "columns": {"instruction": "q", "output": "r"}},
    ]
    counts = build(tmp_path / "out", source=str(a), weight=0.5, mixture=mixture)
    # Held out: 10 of 100, 5 of 50, 20 of 200. Trained: half of 90, twice 45, 30 of 180.
    assert counts == DatasetCounts(
        rows_in=45 + 10 + 90 + 5 + 1 + 1 + 30 + 20,
        rows_train=165,
        rows_eval=35,
        rows_rejected={"broken_json": 1},
        rows_duplicate=1,
        rows_leaked=0,
        rows_left_out=45 + 150,
        rows_repeated=45,
    )
    assert counts.rows_read == 352
    train = read(tmp_path / "out", "train")
    assert Counter(source for source, _ in train) == {"rows.jsonl": 45, "dataset-2/rows.jsonl": 90, "c.jsonl": 30}
    quality = read_quality(tmp_path / "out")
    assert [entry["name"] for entry in quality["datasets"]] == ["rows.jsonl", "rows.jsonl", "c.jsonl"]
    for name in ("rows_read", "rows_train", "rows_eval", "rows_duplicate", "rows_leaked", "rows_left_out"):
        assert sum(entry[name] for entry in quality["datasets"]) == quality["counts"][name]
    assert quality["statistics"]["train"]["num_rows"] == 45 + 45 + 30
    assert "rows.jsonl: 45 training rows left out by its weight or num_rows" in quality["warnings"]
    assert "rows.jsonl: its weight repeats training rows: 45 copies" in quality["warnings"]


def test_dataset_holds_out_the_same_rows_alone_and_in_every_mixture(tmp_path: Path, write_lines: WriteLines) -> None:
    a = str(write_lines("a.jsonl", [ask("a", number) for number in range(60)]))
    b = str(write_lines("b.jsonl", [ask("b", number) for number in range(60)]))
    build(tmp_path / "a", source=a)
    build(tmp_path / "b", source=b)
    alone = [*read(tmp_path / "a", "eval"), *read(tmp_path / "b", "eval")]
    build(tmp_path / "mixed", source=a, weight=0.2, mixture=[{"source": b, "weight": 3}])
    assert sorted(read(tmp_path / "mixed", "eval")) == sorted(alone)


def test_conversation_that_two_datasets_have_is_in_one_place(tmp_path: Path, write_lines: WriteLines) -> None:
    shared = [ask("s", number) for number in range(40)]
    a = write_lines("a.jsonl", [*shared, *(ask("a", number) for number in range(40))])
    b = write_lines("b.jsonl", [*shared, *(ask("b", number) for number in range(10))])
    counts = build(tmp_path / "out", source=str(a), eval_fraction=0.3, mixture=[{"source": str(b)}])
    assert counts.rows_in == counts.rows_read == 130
    ids = [pl.read_parquet(tmp_path / "out" / f"{side}.parquet")["example_id"].to_list() for side in ("train", "eval")]
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1]) == counts.rows_train + counts.rows_eval
    assert counts.rows_duplicate + counts.rows_leaked == 130 - len(ids[0]) - len(ids[1]) > 30
    # Held out of one and trained in the other: a leak. In training or held out of both: a copy.
    assert counts.rows_leaked > 0
    assert counts.rows_duplicate > 0


def test_most_held_out_rows_are_shared_out_by_size(tmp_path: Path, write_lines: WriteLines) -> None:
    a = write_lines("a.jsonl", [ask("a", number) for number in range(300)])
    b = write_lines("b.jsonl", [ask("b", number) for number in range(100)])
    counts = build(tmp_path / "out", source=str(a), eval_fraction=0.5, max_eval_rows=20, mixture=[{"source": str(b)}])
    assert (counts.rows_eval, counts.rows_train) == (20, 380)
    assert Counter(source for source, _ in read(tmp_path / "out", "eval")) == {"a.jsonl": 15, "b.jsonl": 5}
    # 10 * 300 / 400 is 7.5 and 10 * 100 / 400 is 2.5: each is rounded, to 10 together.
    build(tmp_path / "ten", source=str(a), eval_fraction=0.5, max_eval_rows=10, mixture=[{"source": str(b)}])
    assert Counter(source for source, _ in read(tmp_path / "ten", "eval")) == {"a.jsonl": 8, "b.jsonl": 2}


def test_separate_held_out_dataset_is_kept_out_of_every_dataset(tmp_path: Path, write_lines: WriteLines) -> None:
    a = write_lines("a.jsonl", [ask("a", number) for number in range(20)])
    b = write_lines("b.jsonl", [ask("b", number) for number in range(20)])
    held_out = write_lines("held_out/a.jsonl", [ask("a", 3), ask("b", 4), ask("b", 5), ask("e", 1)])
    counts = build(
        tmp_path / "out",
        source=str(a),
        eval_source=str(held_out),
        max_eval_rows=2,
        mixture=[{"source": str(b), "weight": 3}],
    )
    assert counts == DatasetCounts(78, 19 + 18 * 3, 2, {}, 0, 3, rows_left_out=2, rows_repeated=36)
    assert {source for source, _ in read(tmp_path / "out", "eval")} == {"held-out/a.jsonl"}


def test_max_rows_concerns_each_dataset(tmp_path: Path, write_lines: WriteLines) -> None:
    a = write_lines("a.jsonl", [ask("a", number) for number in range(20)])
    b = write_lines("b.jsonl", [ask("b", number) for number in range(20)])
    assert build(tmp_path / "out", source=str(a), max_rows=10, mixture=[{"source": str(b)}]).rows_in == 20


def test_dataset_that_brings_nothing_is_told(tmp_path: Path, write_lines: WriteLines) -> None:
    rows = [ask("a", number) for number in range(20)]
    a, b = write_lines("a.jsonl", rows), write_lines("b.jsonl", rows)
    counts = build(tmp_path / "out", source=str(a), mixture=[{"source": str(b)}])
    assert (counts.rows_train, counts.rows_eval, counts.rows_duplicate + counts.rows_leaked) == (18, 2, 20)
    assert "b.jsonl: none of its 20 rows is trained or held out" in read_quality(tmp_path / "out")["warnings"]


ROW = st.tuples(st.sampled_from("ab"), st.integers(0, 12)).map(lambda row: json.dumps(ask(*row))) | st.just("{")
AMOUNT: st.SearchStrategy[dict[str, Any]] = st.floats(0.05, 4.0).map(lambda weight: {"weight": weight}) | st.just({})
# A file in which no line is JSON is refused whole; that is another law.
LINES = st.lists(ROW, min_size=1, max_size=20).filter(lambda lines: any(line != "{" for line in lines))


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.tuples(LINES, AMOUNT), min_size=1, max_size=3),
    held_out=st.none() | LINES,
    max_rows=st.integers(1, 8),
)
def test_rows_are_accounted_for_whatever_the_mixture(
    parts: list[tuple[list[str], dict[str, Any]]], held_out: list[str] | None, max_rows: int
) -> None:
    good = [json.dumps(ask("good", number)) for number in range(3)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets: list[dict[str, Any]] = []
        for number, (lines, amount) in enumerate(parts):
            (folder / f"{number}.jsonl").write_text("\n".join([*(good if not number else []), *lines]))
            datasets.append({"source": str(folder / f"{number}.jsonl"), "format": "prompt_completion", **amount})
        options: dict[str, Any] = {"eval_fraction": 0.3, "max_eval_rows": max_rows, "max_rejected_fraction": 1.0}
        if held_out is not None:
            (folder / "eval.jsonl").write_text("\n".join([json.dumps(ask("held", 1)), *held_out]))
            options["eval_source"] = str(folder / "eval.jsonl")
        counts = build(folder / "out", mixture=datasets[1:], **datasets[0], **options)
        train, eval_, rejects = (pl.read_parquet(folder / "out" / f"{n}.parquet") for n in ("train", "eval", "rejects"))
    num_lines = 3 + sum(len(lines) for lines, _ in parts) + (0 if held_out is None else 1 + len(held_out))
    assert counts.rows_read == num_lines
    assert (train.height, eval_.height, rejects.height) == (
        counts.rows_train,
        counts.rows_eval,
        sum(counts.rows_rejected.values()),
    )
    assert counts.rows_repeated == train.height - train["example_id"].n_unique()
    assert eval_["example_id"].is_unique().all()
    assert set(train["example_id"]).isdisjoint(eval_["example_id"])
    assert counts.rows_eval <= max_rows
