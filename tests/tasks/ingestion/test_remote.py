"""What lies at an address is read as if it lay here, without more of it being fetched than is read."""

import copy
import gzip
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pytest

from schemas.config import DataConfig, DatasetConfig
from tasks.addresses import AddressError
from tasks.allowed_roots import LIMITED, ROOTS, OutsideRootsError
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError
from tasks.ingestion.shards import name_sources, plan_shards
from tasks.ingestion.sources.sources import check_unchanged, digest_source, find_sources
from tests.object_store import Traffic, serve_bucket
from tests.tasks.ingestion.test_shards import write_long_file

NAMES = ("train.parquet", "eval.parquet", "rejects.parquet", "quality.json")


def make_lines(number: int) -> bytes:
    rows = [f'{{"prompt": "question {n} é", "completion": "answer {n}"}}' for n in range(number)]
    rows[7] = rows[5]
    rows[number - 3] = "{broken"
    return ("\n".join(rows) + "\n").encode()


TRAFFIC = Traffic(r"(GET)")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with serve_bucket("data", TRAFFIC.watch) as client:
        yield client


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which a server gives its files; it knows no ranges."""
    folder = tmp_path_factory.mktemp("web")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None: ...

    def send_head(self) -> Any:
        if self.path == "/elsewhere.jsonl":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/rows.jsonl")  # type: ignore[attr-defined]
            self.end_headers()
            return None
        return super().send_head()


def build(source: str | Path, folder: Path, shard_bytes: int = 1 << 24) -> list[bytes]:
    config = DataConfig(source=str(source), max_rejected_fraction=0.1)
    build_dataset(config, seed=0, folder=folder, shard_bytes=shard_bytes)
    return [(folder / name).read_bytes() for name in NAMES]


SCRIPT = """
import sys
from pathlib import Path
from tests.tasks.ingestion.test_remote import build
build(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
"""


def build_with_workers(source: str, folder: Path, shard_bytes: int) -> list[bytes]:
    """Build in a process of its own: its workers know the store's address from their first moment."""
    subprocess.run([sys.executable, "-c", SCRIPT, source, str(folder), str(shard_bytes)], check=True)
    return [(folder / name).read_bytes() for name in NAMES]


def test_lines_in_a_bucket_give_the_bytes_of_a_file_divided_or_not(bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(make_lines(1500))
    bucket.put_object(Bucket="data", Key="lines/rows.jsonl", Body=make_lines(1500))
    expected = build(tmp_path / "rows.jsonl", tmp_path / "local")
    assert build("s3://data/lines/rows.jsonl", tmp_path / "whole") == expected
    assert build_with_workers("s3://data/lines/rows.jsonl", tmp_path / "divided", 20_000) == expected
    rejects = pl.read_parquet(tmp_path / "divided" / "rejects.parquet")
    assert rejects.select("source", "line").rows() == [("rows.jsonl", 1498)]


PLAN = """
import sys
from schemas.config import DataConfig
from tasks.ingestion.shards import name_sources, plan_shards
config = DataConfig(source=sys.argv[1])
for shard in plan_shards(config, name_sources(config), int(sys.argv[2])):
    print([(*part.span, part.num_bytes, part.layout) for part in shard.parts])
"""


def plan(source: str | Path, shard_bytes: int) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PLAN, str(source), str(shard_bytes)], capture_output=True, check=True)
    return done.stdout.decode().splitlines()


@pytest.mark.parametrize(("num_blank", "most_bytes"), [(0, 14_500_000), (1_500_000, 22_000_000)])
def test_a_divided_file_of_lines_is_brought_to_its_first_rows_only(
    bucket: Any, tmp_path: Path, num_blank: int, most_bytes: int
) -> None:
    """Workers count its lines; a megabyte of it has the first rows, or the rest of the first part is brought."""
    row = f'{{"prompt": "question", "completion": "{"words " * 160}"}}\n'.encode()
    content = b"\n" * num_blank + row * 12_000
    (tmp_path / "rows.jsonl").write_bytes(content)
    bucket.put_object(Bucket="data", Key=f"front/{num_blank}.jsonl", Body=content)
    TRAFFIC.clear()
    planned = plan(f"s3://data/front/{num_blank}.jsonl", 6_000_000)
    assert planned == plan(tmp_path / "rows.jsonl", 6_000_000)
    assert len(planned) == 3
    assert len(content) < TRAFFIC.num_bytes["GET"] < most_bytes


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_list_and_csv_in_a_bucket_are_divided(bucket: Any, tmp_path: Path, kind: str) -> None:
    path = write_long_file(tmp_path / f"rows.{kind}")
    bucket.upload_file(str(path), "data", f"long/rows.{kind}")
    expected = build(path, tmp_path / "local")
    assert build(f"s3://data/long/rows.{kind}", tmp_path / "whole") == expected
    config = DataConfig(source=f"s3://data/long/rows.{kind}")
    assert len(list(plan_shards(config, name_sources(config), 4000))) > 3
    assert build_with_workers(config.source, tmp_path / "divided", 4000) == expected


def test_row_groups_are_fetched_apart(bucket: Any, tmp_path: Path) -> None:
    rows = pl.DataFrame({"prompt": [f"q {n}" for n in range(900)], "completion": [f"a {n}" for n in range(900)]})
    rows.write_parquet(tmp_path / "rows.parquet", row_group_size=100, compression="uncompressed")
    bucket.upload_file(str(tmp_path / "rows.parquet"), "data", "groups/rows.parquet")
    expected = build(tmp_path / "rows.parquet", tmp_path / "local")
    assert build_with_workers("s3://data/groups/rows.parquet", tmp_path / "divided", 5_000) == expected


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_lines_are_read_here_and_there_and_damage_is_told(bucket: Any, tmp_path: Path, ending: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(make_lines(300))
    packed = (
        gzip.compress(make_lines(300)) if ending == "gz" else pa.Codec("zstd").compress(make_lines(300), asbytes=True)
    )
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(packed)
    bucket.put_object(Bucket="data", Key=f"packed/rows.jsonl.{ending}", Body=packed)
    plain = build(tmp_path / "rows.jsonl", tmp_path / "plain")
    unpacked = build(path, tmp_path / "unpacked")
    assert pl.read_parquet(unpacked[0]).drop("source").equals(pl.read_parquet(plain[0]).drop("source"))
    assert build(f"s3://data/packed/rows.jsonl.{ending}", tmp_path / "remote") == unpacked
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=rf"{path}: the compressed file is damaged or cut short"):
        build(path, tmp_path / "cut")


def test_folders_and_patterns_name_files_as_folders_here_do(bucket: Any, tmp_path: Path) -> None:
    for name in ("a.jsonl", "deep/b.jsonl", "deep/er/c.jsonl", "deep/notes.txt", ".hidden/d.jsonl"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text('{"prompt": "q", "completion": "a"}\n')
        bucket.upload_file(str(tmp_path / "folder" / name), "data", f"folder/{name}")

    def find(source: str) -> list[str]:
        (found,) = find_sources(DatasetConfig(source=source))
        return [file.name for file in found.files]

    here = find_sources(DatasetConfig(source=str(tmp_path / "folder")))[0]
    there = find_sources(DatasetConfig(source="s3://data/folder/"))[0]
    assert [file.name for file in there.files] == [file.name for file in here.files] == [
        "a.jsonl", "deep/b.jsonl", "deep/er/c.jsonl",
    ]  # fmt: skip
    assert there.warnings == here.warnings == ("no rows, and not read: 1 file of the folder: deep/notes.txt",)
    assert find("s3://data/folder/*/*.jsonl") == ["deep/b.jsonl"]
    assert find("s3://data/folder/**/[bc].jsonl") == ["deep/b.jsonl", "deep/er/c.jsonl"]
    for source, what in (("s3://data/folder/x*", "nothing is there"), ("s3://data/none.jsonl", "cannot be read")):
        with pytest.raises(DataError, match=rf"{source.replace('*', '.')}: .*{what}"):
            find(source)


def test_ten_thousand_files_are_planned_without_being_read(bucket: Any) -> None:
    from moto.s3.models import s3_backends

    keys = s3_backends["123456789012"]["aws"].buckets["data"].keys
    bucket.put_object(Bucket="data", Key="many/0.jsonl", Body=b"x" * 4000)
    for number in range(1, 10_000):  # not sent one by one: that takes minutes
        key = copy.copy(keys["many/0.jsonl"])
        key.name = f"many/{number}.jsonl"
        keys[key.name] = key
    config = DataConfig(source="s3://data/many")
    sources = name_sources(config)
    shards = list(plan_shards(config, sources))
    assert (len(sources[0][0].files), len(shards)) == (10_000, 3)


def test_what_changes_in_a_bucket_changes_the_digest(bucket: Any) -> None:
    bucket.put_object(Bucket="data", Key="changing/rows.jsonl", Body=make_lines(10))
    config = DataConfig(source="s3://data/changing/")
    digest = digest_source(config)
    check_unchanged(config, digest)
    bucket.put_object(Bucket="data", Key="changing/rows.jsonl", Body=make_lines(11))
    with pytest.raises(DataError, match="the files were changed while they were read"):
        check_unchanged(config, digest)


def test_a_file_of_a_web_server_is_read_and_a_missing_one_told(web: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = web
    (folder / "rows.jsonl").write_bytes(make_lines(300))
    expected = build(folder / "rows.jsonl", tmp_path / "local")
    assert build(f"{address}/rows.jsonl", tmp_path / "whole") == expected
    assert build(f"{address}/rows.jsonl", tmp_path / "not-divided", 1 << 14) == expected
    with pytest.raises(DataError, match=rf"{address}/none\.jsonl: it cannot be read .*404"):
        build(f"{address}/none.jsonl", tmp_path / "none")


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("ftp://host/rows.jsonl", "no such addresses are read: known are s3://"),
        ("https://me:secret@host/rows.jsonl", "names a user"),
        ("s3://key:secret@bucket/rows.jsonl", "names a user"),
        ("https://host/rows.jsonl?X-Amz-Signature=secret", "may be a key"),
        ("https://host/a/%2e%2e/rows.jsonl", "lead nowhere"),
        ("s3://bucket/../rows.jsonl", "lead nowhere"),
        ("s3:///rows.jsonl", "no bucket or host"),
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(address: str, why: str) -> None:
    with pytest.raises(AddressError, match=why) as refused:
        find_sources(DatasetConfig(source=address))
    assert "secret" not in str(refused.value)


def test_runs_of_the_form_read_no_address_but_those_below_a_root(
    bucket: Any, web: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = web
    (folder / "rows.jsonl").write_bytes(make_lines(20))
    bucket.put_object(Bucket="data", Key="team/rows.jsonl", Body=make_lines(20))
    monkeypatch.setenv(LIMITED, "1")
    monkeypatch.setenv(ROOTS, f"{tmp_path}:s3://data/team:{address}/")
    for source in ("s3://data/team", "s3://data/team/rows.jsonl", f"{address}/rows.jsonl"):
        assert find_sources(DatasetConfig(source=source))[0].files == (ANY,)
    refused = (
        "s3://data/teams/rows.jsonl",
        "s3://data/tea*",
        "s3://other/team",
        "http://127.0.0.1:1/x.jsonl",
        "hf://a",
    )
    # The last one is told by the server to go elsewhere: it does not.
    for source in (*refused, f"{address}/elsewhere.jsonl"):
        with pytest.raises(OutsideRootsError, match=f"is below none of the addresses.*{ROOTS}"):
            find_sources(DatasetConfig(source=source))
    monkeypatch.delenv(LIMITED)
    assert find_sources(DatasetConfig(source=f"{address}/elsewhere.jsonl"))[0].files == (ANY,)
