"""What machines share, in a folder and in a bucket: whole or not there, and what it was."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.training.place import DamageError, Place, PlaceError, find_place, open_place
from tests.object_store import serve_bucket


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serve_bucket("shared"):
        yield "s3://shared/a/team"


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return open_place(str(tmp_path / "shared"))
    return open_place(f"{request.getfixturevalue('bucket')}/{request.node.name}")


def write(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_comes_back_as_it_was_put_and_replaces_what_was_there(place: Place, tmp_path: Path) -> None:
    large = bytes(range(256)) * 80_000  # 20 MB, more than a block
    place.put_folder(write(tmp_path / "one", weights=large, below__it=b"", other=b"x"), "step-1")
    mine = write(tmp_path / "mine", weights=large, other=b"y", stale=b"z")
    before = (mine / "weights").stat().st_ino
    place.fetch_folder("step-1", mine)
    assert read(mine) == {"weights": large, "below/it": b"", "other": b"x"}
    assert (mine / "weights").stat().st_ino == before  # it was the same: not fetched
    place.put_folder(write(tmp_path / "two", only=b"new"), "step-1")
    place.fetch_folder("step-1", mine)
    assert read(mine) == {"only": b"new"}
    assert place.list_names("") == ["step-1"]
    place.remove("step-1")
    assert place.list_names("") == place.list_names("nothing") == []
    assert place.list_files("step-1") is None


def test_what_is_not_whole_or_was_changed_is_refused(place: Place, tmp_path: Path) -> None:
    place.put_folder(write(tmp_path / "one", weights=b"1234"), "a/step-1")
    place.write_text("a/step-1/weights", "4321")
    with pytest.raises(DamageError, match=r"a/step-1/weights: it is damaged: its sha256"):
        place.fetch_folder("a/step-1", tmp_path / "mine")
    place.remove("a/step-1/weights")
    with pytest.raises(DamageError, match="weights: it is damaged"):
        place.fetch_folder("a/step-1", tmp_path / "mine")
    place.write_text("a/step-1/files.json", "[1")
    with pytest.raises(DamageError, match=r"files.json: it is damaged"):
        place.fetch_folder("a/step-1", tmp_path / "mine")
    place.remove("a/step-1/files.json")
    with pytest.raises(DamageError, match="not written to its end"):
        place.fetch_folder("a/step-1", tmp_path / "mine")
    assert read(tmp_path / "mine") == {}


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a\\..\\b"])
def test_a_list_names_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    place = open_place(str(tmp_path / "shared"))
    place.write_text("step-1/files.json", json.dumps({name: [1, "0" * 64]}))
    with pytest.raises(PlaceError, match="outside its folder"):
        place.fetch_folder("step-1", tmp_path / "mine")


def test_texts_are_read_as_written_or_not_at_all(place: Place) -> None:
    assert place.read_text("jobs/x.json") is None
    for text in ("one", "two"):
        place.write_text("jobs/x.json", text)
        assert place.read_text("jobs/x.json") == text
    assert place.list_names("jobs") == ["x.json"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/team", "no such addresses are read"),
        ("hf://datasets/x", "nothing can be written there: give a folder, or s3://, gs://, az://"),
        ("s3://key@bucket/team", "names a user"),
    ],
)
def test_places_that_cannot_be_written_are_refused(address: str, message: str) -> None:
    with pytest.raises(PlaceError, match=message):
        find_place({"SFT_TEAM": address})


def test_no_place_is_named() -> None:
    assert find_place({}) is None


def test_what_stands_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PlaceError, match=r"SFT_TEAM = .*file: it cannot be read or written .* MB are free there"):
        open_place(str(tmp_path / "file")).write_text("jobs/x.json", "text")
