"""Calls on a Ray cluster give what the local pool gives, whatever dies."""

import hashlib
import json
import os
import pickle
import socket
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from schemas.config import DataConfig, TokenizationConfig
from tasks import cluster_worker, execution
from tasks.allowed_roots import LIMITED, ROOTS
from tasks.cluster_connection import ADDRESS, ClusterError
from tasks.ingestion import shard_runner, tables
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError
from tasks.ingestion.shards import name_sources, plan_shards
from tasks.ingestion.splitting import order, pair_search
from tasks.parcels import Enclosure, Parcel
from tasks.storage import digest_folder
from tasks.stored_files import LIST_NAME, LostError, read_list
from tasks.tokenization.examples import tokenize_dataset, tokenize_stored
from tasks.tokenization.templates import prepare_tokenizer
from tests.object_store import serve_bucket
from tests.tasks.cluster_calls import double, read_limit
from tests.tasks.cluster_nodes import Nodes, start_nodes
from tests.tasks.ingestion.test_shards import write_long_file

# Not by importing it: Ray reads its settings then.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="the ray extra is not installed")
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("train.parquet", "eval.parquet", "rejects.parquet", "quality.json")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with serve_bucket("made") as client:
        yield client


@pytest.fixture(scope="module")
def nodes(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A cluster of two nodes with a core each, beside this process; `SFT_RAY_ADDRESS` names it.

    Workers have the keys of a bucket.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tasks' / 'unimported'}{os.pathsep}{ROOT}")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_health_check_period_ms", "1000")  # a lost machine is missed sooner than after 15 s
        patch.setenv("RAY_AUTH_TOKEN", "a-token-of-the-tests-with-32-letters")
        patch.setenv("SFT_HOME", str(tmp_path_factory.mktemp("home")))
        with start_nodes(2) as found:
            patch.setenv(ADDRESS, found.address)
            yield found
            execution.stop()


def enclose(read: Path, number: int, made: Path) -> Parcel:
    return Parcel((Enclosure(read, is_common=True),), made)


def test_what_is_read_is_sent_and_what_is_made_comes_back_in_order(nodes: Nodes, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "read.bin").write_bytes(content)
    calls = [(tmp_path / "read.bin", number, tmp_path / f"made-{number}") for number in range(5)]
    told: list[tuple[int, int]] = []
    workers = execution.map(double, calls, parcel=enclose, tell=lambda done, of: told.append((done, of)))
    assert os.getpid() not in workers
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    for _, _, made in calls:
        assert (made / "deep" / "twice.bin").read_bytes() == content * 2


def test_the_first_error_in_order_comes_back_as_it_was(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "read.bin").write_bytes(b"x")
    calls = [(tmp_path / "read.bin", number, tmp_path / f"made{number}") for number in (1, -1, -9, 2)]
    with pytest.raises(ValueError, match=r"^call -1 of read\.bin$"):
        execution.map(double, calls, parcel=enclose)


def write_rows(path: Path) -> Path:
    rows = [f'{{"prompt": "question {number} é", "completion": "answer {number}"}}' for number in range(3000)]
    rows[7] = rows[2500] = rows[5]
    rows[2900] = "{broken"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def read_tables(source: Path, folder: Path, shard_bytes: int) -> list[str]:
    config = DataConfig(source=str(source), max_rejected_fraction=0.1)
    counts = build_dataset(config, seed=0, folder=folder, shard_bytes=shard_bytes)
    assert (counts.rows_in, counts.rows_train + counts.rows_eval, counts.rows_duplicate) == (3000, 2997, 2)
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES]


@pytest.fixture
def whole(tmp_path: Path) -> list[str]:
    """What is read in one piece in this process."""
    return read_tables(write_rows(tmp_path / "rows.jsonl"), tmp_path / "whole", 1 << 20)


def test_a_dataset_is_the_same_bit_by_bit(nodes: Nodes, tmp_path: Path, whole: list[str]) -> None:
    source = tmp_path / "rows.jsonl"
    (tmp_path / "read").mkdir()
    assert read_tables(source, tmp_path / "cluster", 20_000) == whole


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_of_a_list_and_of_csv_each_worker_is_sent_its_part(nodes: Nodes, tmp_path: Path, kind: str) -> None:
    path = write_long_file(tmp_path / f"rows.{kind}")
    config = DataConfig(source=str(path))
    *_, last = plan_shards(config, name_sources(config), 4000)
    (sent,) = shard_runner.enclose(last, tmp_path / "made").reads
    assert sent.spans is not None
    assert sum(stop - start for start, stop in sent.spans) < 6000
    for folder, shard_bytes in (("whole", 1 << 20), ("cluster", 4000)):
        build_dataset(config, seed=0, folder=tmp_path / folder, shard_bytes=shard_bytes)
    for name in NAMES:
        assert (tmp_path / "cluster" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def map_with_a_death(marks: Path) -> Any:
    """Return `execution.map` with a worker that is killed when it has read a shard; what was done is marked."""
    from tests.tasks import cluster_calls

    spread = execution.map

    def map_dying(function: Any, calls: Any, *, parcel: Any, tell: Any) -> Any:
        dying = [(*call, marks) for call in calls]
        return spread(cluster_calls.finish_shard_or_die, dying, parcel=lambda *call: parcel(*call[:-1]))

    return map_dying


def test_a_worker_that_is_killed_changes_nothing(
    nodes: Nodes, tmp_path: Path, whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "map", map_with_a_death(tmp_path))
    assert read_tables(tmp_path / "rows.jsonl", tmp_path / "cluster", 20_000) == whole
    assert (tmp_path / "killed").is_dir()


def test_a_machine_that_is_lost_changes_nothing(nodes: Nodes, tmp_path: Path, whole: list[str]) -> None:
    extra = nodes.join()
    removed: list[int] = []

    def lose(num_done: int, num_all: int) -> None:
        if num_done == 3:
            nodes.kill(extra)
            removed.append(num_all)

    config = DataConfig(source=str(tmp_path / "rows.jsonl"), max_rejected_fraction=0.1)
    sources = name_sources(config)
    shards = shard_runner.read_all(config, sources, tmp_path / "shards", 20_000, tell=lose)
    assert removed == [len(shards)]
    build_dataset(config, seed=0, folder=tmp_path / "cluster", shards=shards)
    assert [hashlib.sha256((tmp_path / "cluster" / name).read_bytes()).hexdigest() for name in NAMES] == whole


@pytest.mark.parametrize("is_mixed", [False, True])
def test_tables_in_parts_are_the_same_bit_by_bit(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mixed: bool
) -> None:
    """From workers of this machine and of the cluster, of rows as they are and of a mixture, however they are read."""
    monkeypatch.setattr(tables, "GROUP_ROWS", 400)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"prompt": "also {n}", "completion": "a {n}"}}\n' for n in range(700)))
    mixture = [{"source": str(other), "weight": 2.5}] if is_mixed else []
    settings = {"source": str(write_rows(tmp_path / "rows.jsonl")), "mixture": mixture, "max_rejected_fraction": 0.1}
    config = DataConfig.model_validate(settings)
    digests = set()
    for name, shard_bytes, scattered_rows in (
        ("local", 1 << 20, 10_000),
        ("cluster", 20_000, 10_000),
        ("ray", 9000, 1),
    ):
        with monkeypatch.context() as patch:
            if name == "local":
                patch.delenv(ADDRESS)
            patch.setattr(order, "SCATTERED_ROWS", scattered_rows)
            build_dataset(config, seed=0, folder=tmp_path / name, shard_bytes=shard_bytes)
        digests.add(digest_folder(tmp_path / name))
    assert len(digests) == 1
    assert len(list((tmp_path / "ray" / "train.parquet").iterdir())) == (11 if is_mixed else 7)
    assert not list((tmp_path / "ray").glob("shards*"))


def test_examples_are_the_same_bit_by_bit(
    nodes: Nodes, tmp_path: Path, whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_ROWS", 500)
    build_dataset(DataConfig(source=str(tmp_path / "rows.jsonl")), seed=0, folder=tmp_path / "dataset")
    prepared = prepare_tokenizer(ROOT / "deploy" / "demo" / "base_model", None)
    counts, contents = [], []
    for name, rows_per_shard in (("in place", 10_000), ("cluster", 500)):
        folder = tmp_path / name
        made = tokenize_dataset(
            tmp_path / "dataset", prepared, folder, TokenizationConfig(), rows_per_shard=rows_per_shard
        )
        counts.append(made)
        files = (path for path in folder.rglob("*.parquet") if path.is_file())
        contents.append({path.relative_to(folder).as_posix() for path in files})
        assert digest_folder(folder) == digest_folder(tmp_path / "in place")
    assert counts[0] == counts[1]
    assert (
        contents[0]
        == contents[1]
        == {*(f"train.parquet/{number:06}.parquet" for number in range(6)), "eval.parquet", "rejects.parquet"}
    )


def list_made(bucket: Any, folder: str) -> dict[str, int]:
    found = bucket.list_objects_v2(Bucket="made", Prefix=f"{folder}/").get("Contents", [])
    return {entry["Key"].removeprefix(f"{folder}/"): entry["Size"] for entry in found if entry["Size"]}


@pytest.mark.parametrize("is_mixed", [False, True])
def test_workers_put_rows_and_tables_and_tokens_into_a_store(
    nodes: Nodes, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mixed: bool
) -> None:
    """No texts and no tokens come back, though a worker is killed, and digests are those of tables made here."""
    monkeypatch.setattr(tables, "GROUP_ROWS", 400)
    monkeypatch.setattr(order, "SCATTERED_ROWS", 500)
    monkeypatch.setattr(pair_search, "SEARCHED_ROWS", 700)
    alike = (f'{{"prompt": "{" ".join(map(str, range(50)))} variant {n}", "completion": "x"}}' for n in range(60))
    with write_rows(tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n".join(alike))
    mixture = [{"source": str(write_long_file(tmp_path / "other.json"))}] if is_mixed else []
    settings = {"source": str(tmp_path / "rows.jsonl"), "mixture": mixture, "max_rejected_fraction": 0.1}
    config, prepared = DataConfig.model_validate(settings), prepare_tokenizer(ROOT / "deploy/demo/base_model", None)
    with monkeypatch.context() as patch:
        patch.delenv(ADDRESS)
        here = build_dataset(config, seed=0, folder=tmp_path / "here", shard_bytes=1 << 20)
        tokens = tokenize_dataset(tmp_path / "here", prepared, tmp_path / "tokens here", TokenizationConfig())
    address = f"s3://made/{is_mixed}"
    sources, store = name_sources(config), order.Store(f"{address}/dataset", f"{address}/scratch")
    folder = tmp_path / "shards"
    with monkeypatch.context() as patch:
        patch.setattr(execution, "map", map_with_a_death(tmp_path))
        shards = shard_runner.read_all(config, sources, folder, 20_000, store=store.scratch)
    assert (tmp_path / "killed").is_dir()
    assert not [*folder.rglob("rows-*.arrow"), *folder.rglob("shingles-*.npz")]
    # What another attempt finds: shards whose rows are in the store are not read again, one whose rows are gone is.
    made = list_made(bucket, f"{is_mixed}/scratch")
    bucket.delete_object(Bucket="made", Key=f"{is_mixed}/scratch/{next(iter(made))}")
    before = {shard: (shard / "summary.json").stat().st_mtime_ns for shard in shards}
    assert shard_runner.read_all(config, sources, folder, 20_000, store=store.scratch) == shards
    assert sum((shard / "summary.json").stat().st_mtime_ns != before[shard] for shard in shards) == 1
    assert list_made(bucket, f"{is_mixed}/scratch") == made
    there = build_dataset(config, seed=0, folder=tmp_path / "there", shards=shards, store=store)
    assert there == here
    assert digest_folder(tmp_path / "there") == digest_folder(tmp_path / "here")
    quality = json.loads((tmp_path / "there" / "quality.json").read_text(encoding="utf-8"))
    assert quality["near_duplicates"]["num_eval_rows"] > 0
    left = {path.name for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert left == {"rejects.parquet", "quality.json", LIST_NAME}
    parts = list_made(bucket, f"{is_mixed}/dataset")
    assert sum(file.num_rows for file in read_list(tmp_path / "there").values()) == here.rows_train + here.rows_eval
    assert parts == {name: file.num_bytes for name, file in read_list(tmp_path / "there").items()}
    assert len([name for name in parts if name.startswith("train.parquet/")]) > 6

    made_there = tokenize_stored(
        tmp_path / "there", store.tables, f"{address}/tokens", prepared, tmp_path / "tokens", TokenizationConfig()
    )
    assert made_there == tokens
    assert digest_folder(tmp_path / "tokens") == digest_folder(tmp_path / "tokens here")
    assert not list((tmp_path / "tokens").glob("*rain.parquet*"))
    assert list_made(bucket, f"{is_mixed}/tokens").keys() == parts.keys()
    bucket.delete_object(Bucket="made", Key=f"{is_mixed}/dataset/train.parquet/000003.parquet")
    with pytest.raises(LostError, match=rf"{address}/dataset/train\.parquet/000003\.parquet is gone"):
        tokenize_stored(tmp_path / "there", store.tables, address, prepared, tmp_path / "no", TokenizationConfig())


def test_a_worker_may_read_what_the_run_may_read(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> list[str | None]:
        return execution.map(read_limit, [(), ()], parcel=lambda: Parcel(()))

    monkeypatch.setenv(LIMITED, "1")
    monkeypatch.setenv(ROOTS, "/srv/data:s3://data/team")
    assert ask() == ["/srv/data:s3://data/team"] * 2
    monkeypatch.delenv(LIMITED)
    assert ask() == [None, None]


def test_a_file_is_named_as_people_know_it_where_a_worker_cannot_read_it(nodes: Nodes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(write_rows(path).read_bytes().replace(b"question 2222 ", b"question \xff "))
    with pytest.raises(DataError, match=rf"{path}: not UTF-8: byte \d+ .* on line 2223"):
        read_tables(path, tmp_path / "out", 20_000)


def test_another_version_on_a_worker_is_refused_before_anything_is_imported() -> None:
    order = pickle.dumps((double, ()))
    error, result, files = cluster_worker.work("tests.tasks.cluster_calls", {"code": "0" * 64}, order, [], Path("made"))
    assert isinstance(error, cluster_worker.VersionError)
    assert f"a worker on {socket.gethostname()} has another version of the product" in str(error)
    assert "there and 000000000000 here" in str(error)
    assert (result, files) == (None, [])


def test_an_address_where_nothing_answers_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv(ADDRESS, f"127.0.0.1:{port}")
    execution.stop()
    began = time.monotonic()
    with pytest.raises(ClusterError, match=rf"127\.0\.0\.1:{port}: no cluster can be used .*refused.*ray start --head"):
        execution.map(double, [(tmp_path, 1, tmp_path)], parcel=enclose)
    assert time.monotonic() - began < 10
