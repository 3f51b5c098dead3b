"""What workers put into a store is what its list says, and a folder has one digest wherever its files are."""

import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.artifacts import Ref
from tasks import stored_files, tracking
from tasks.partitions import name_part
from tasks.storage import cached_folder, digest_folder
from tasks.stored_files import LIST_NAME, LostError, StoredFile, StoreError
from tests.object_store import Traffic, serve_bucket

PARTS = [f"train.parquet/{number:06}.parquet" for number in range(3)]


TRAFFIC = Traffic("(PUT|POST)")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with serve_bucket("store", TRAFFIC.watch) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset's folder: a table of three parts, and small files."""
    path = tmp_path / "dataset"
    (path / "train.parquet").mkdir(parents=True)
    for number in range(3):
        pl.DataFrame({"n": [number] * 1000}).write_parquet(name_part(path / "train.parquet", number))
    (path / "quality.json").write_text("{}")
    return path


def put_away(folder: Path, address: str) -> None:
    """Move the parts of the table to an address, as workers would have put them there."""
    files = {name: stored_files.put_file(folder / name, f"{address}/{name}", 1000) for name in PARTS}
    shutil.rmtree(folder / "train.parquet")
    stored_files.write_list(folder, files)


def test_a_file_comes_back_as_it_was_put_there_or_is_named(bucket: Any, tmp_path: Path) -> None:
    path, address = tmp_path / "part", "s3://store/a/part"
    path.write_bytes(b"0123456789")
    file = stored_files.put_file(path, address, 3)
    assert (file.num_bytes, file.num_rows) == (10, 3)
    assert stored_files.read_file(address, file) == b"0123456789"
    with pytest.raises(LostError, match=r"s3://store/a/part is damaged from byte 2 to 5"):
        stored_files.read_span(address, 2, 5, file.sha256)
    assert stored_files.list_sizes("s3://store/a") == {"part": 10}
    assert stored_files.list_sizes("s3://store/none") == {}
    bucket.put_object(Bucket="store", Key="a/part", Body=b"0123456780")
    with pytest.raises(LostError, match=r"s3://store/a/part is damaged"):
        stored_files.read_file(address, file)
    stored_files.remove_files("s3://store/a")
    with pytest.raises(LostError, match=r"s3://store/a/part is gone"):
        stored_files.read_file(address, file)


@pytest.mark.parametrize(("num_bytes", "requests"), [(8_000_000, {"PUT": 1}), (24_000_000, {"PUT": 3, "POST": 2})])
def test_a_file_is_one_request_unless_it_is_large(
    bucket: Any, tmp_path: Path, num_bytes: int, requests: dict[str, int]
) -> None:
    path = tmp_path / "part"
    path.write_bytes(random.Random(0).randbytes(num_bytes))
    TRAFFIC.clear()
    file = stored_files.put_file(path, "s3://store/size/part")
    assert TRAFFIC.requests == requests
    assert num_bytes <= TRAFFIC.num_bytes["PUT"] < num_bytes + 10_000
    assert stored_files.put_file(path, "s3://store/size/part", sha256=file.sha256) == file
    assert hashlib.sha256(stored_files.read_file("s3://store/size/part", file)).hexdigest() == file.sha256


def test_whether_a_worker_can_write_is_tried(bucket: Any) -> None:
    assert stored_files.try_store("s3://store/trial") == ""
    assert bucket.list_objects_v2(Bucket="store", Prefix="trial/trial").get("KeyCount") == 0
    assert "s3://no-such-bucket/x/trial" in stored_files.try_store("s3://no-such-bucket/x")


def test_a_folder_has_one_digest_wherever_its_files_are(bucket: Any, folder: Path) -> None:
    whole = digest_folder(folder)
    put_away(folder, "s3://store/dataset")
    assert stored_files.find_absent(folder) == PARTS
    assert stored_files.find_absent(folder, ["quality.json"]) == []
    assert stored_files.find_absent(folder, [PARTS[1]]) == [PARTS[1]]
    assert digest_folder(folder) == whole
    files = stored_files.read_list(folder)
    stored_files.write_list(folder, {**files, PARTS[0]: files[PARTS[0]]._replace(sha256="0" * 64)})
    assert digest_folder(folder) != whole
    stored_files.write_list(folder, {"../outside": StoredFile(1, "0")})
    with pytest.raises(LostError, match="outside of its folder"):
        digest_folder(folder)
    (folder / LIST_NAME).write_text("[")
    with pytest.raises(LostError, match="is damaged"):
        digest_folder(folder)


@pytest.fixture
def ref(bucket: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ref:
    """The dataset, its table put into the store by workers, published; and a machine that has nothing of it yet."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    place = f"s3://store/{tmp_path.name}"
    experiment = tracking.client().create_experiment("parts", artifact_location=place)
    run_id = tracking.client().create_run(experiment).info.run_id
    address = tracking.find_store(run_id, "dataset")
    assert address == f"{place}/{run_id}/artifacts/dataset"
    whole = digest_folder(folder)
    put_away(folder, address)
    uri, digest = tracking.publish(folder, run_id, "dataset")
    assert digest == whole
    found = Ref(uri=uri, digest=digest, mlflow_run_id=run_id)
    assert tracking.find_address(found) == address
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "other"))
    return found


def list_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_machine_fetches_the_parts_that_it_needs(ref: Ref) -> None:
    folder = tracking.resolve_some(ref)
    assert list_files(folder) == {LIST_NAME, "quality.json"}
    tracking.check(ref)
    assert [pl.read_parquet(part)["n"][0] for part in tracking.read_parts(ref, "train.parquet", [2, 9])] == [2, 0, 1]
    assert list_files(folder) == {LIST_NAME, "quality.json"}
    assert tracking.resolve_some(ref, PARTS[1]) == folder
    assert list_files(folder) == {LIST_NAME, "quality.json", PARTS[1]}
    assert tracking.resolve(ref) == folder == cached_folder(ref.digest)
    assert list_files(folder) == {LIST_NAME, "quality.json", *PARTS}
    assert pl.read_parquet(folder / "train.parquet")["n"].to_list() == [0] * 1000 + [1] * 1000 + [2] * 1000


def test_a_part_that_is_damaged_here_is_fetched_again(ref: Ref) -> None:
    folder = tracking.resolve(ref)
    (folder / PARTS[1]).write_bytes(b"x")
    assert list_files(tracking.resolve_some(ref)) == {LIST_NAME, "quality.json"}
    assert pl.read_parquet(tracking.resolve(ref) / PARTS[1])["n"].to_list() == [1] * 1000


def test_a_part_that_is_damaged_or_gone_in_the_store_is_named(bucket: Any, ref: Ref) -> None:
    key = f"{str(tracking.find_address(ref)).removeprefix('s3://store/')}/{PARTS[1]}"
    content = bucket.get_object(Bucket="store", Key=key)["Body"].read()
    bucket.put_object(Bucket="store", Key=key, Body=content[:-1] + b"x")
    tracking.check(ref)  # of the same size: this is found when it is fetched
    with pytest.raises(tracking.ArtifactError, match=rf"{PARTS[1]} is not the file that was put there"):
        tracking.resolve(ref)
    bucket.put_object(Bucket="store", Key=key, Body=content[:-1])
    with pytest.raises(tracking.ArtifactError, match=rf"{PARTS[1]} is gone or damaged"):
        tracking.check(ref)
    bucket.delete_object(Bucket="store", Key=key)
    for look in (tracking.check, tracking.resolve):
        with pytest.raises(tracking.ArtifactError, match=rf"{PARTS[1]}.* start the run"):
            look(ref)


def test_what_a_server_hands_on_is_below_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = tracking.client().create_experiment("served", artifact_location="mlflow-artifacts:/7")
    run_id = tracking.client().create_run(experiment).info.run_id
    for root, address in (("", None), ("/srv/artifacts", None), ("s3://store/root/", f"s3://store/root/7/{run_id}")):
        monkeypatch.setenv("SFT_ARTIFACTS", root)
        found = tracking.find_store(run_id, "dataset")
        assert found == (address and f"{address}/artifacts/dataset")


def test_what_no_worker_can_reach_has_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = tracking.client().create_experiment("here", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = tracking.client().create_run(experiment).info.run_id
    assert tracking.find_store(run_id, "dataset") is None
    assert tracking.find_address(Ref(uri=str(tmp_path), digest="")) is None


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stored_files, "_PAUSES_SECONDS", ())
    (tmp_path / "part").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/part cannot be read"), serve_bucket("other"):
        stored_files.put_file(tmp_path / "part", "s3://no-such-bucket/part")
