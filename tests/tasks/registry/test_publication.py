"""A published dataset is its content: kept once, found by name and version, and read back as it was."""

from pathlib import Path

import pytest

from schemas.artifacts import Published
from schemas.config import DataConfig
from tasks import tracking
from tasks.ingestion.sources.sources import digest_source
from tasks.registry import publication, sources

pytestmark = pytest.mark.usefixtures("tracked")


def _publish(name: str, file: Path, text: str) -> Published:
    file.write_text(text)
    return publication.publish_files(name, {file.name: file}, {"rows": {"rows in": 2}}, source=str(file), who="ann")


def test_new_content_is_a_new_version_and_known_content_is_the_version_it_has(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    first, second, again = (_publish("chats", file, text) for text in ("one\n", "two\n", "one\n"))
    assert (first.address, first.is_new) == ("datasets:/chats/1", True)
    assert (second.address, second.is_new) == ("datasets:/chats/2", True)
    assert (again.address, again.is_new) == ("datasets:/chats/1", False)
    assert again.digest == first.digest
    assert publication.find_published("datasets:/chats").version == "2"
    assert _publish("others", file, "one\n").address == "datasets:/others/1"


def test_a_version_says_in_mlflow_what_it_is(tmp_path: Path) -> None:
    published = _publish("told", tmp_path / "rows.jsonl", "one\n")
    run = tracking.get_run(str(published.mlflow_run_id))
    assert (run.info.run_name, run.info.status) == ("told version 1", "FINISHED")
    assert run.data.tags["sft.published_by"] == "ann"
    assert "rows in 2" in run.data.tags["mlflow.note.content"]
    assert run.inputs is not None
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("told", published.digest[:36])


def test_an_upload_that_was_cut_short_is_no_version(tmp_path: Path) -> None:
    _publish("cut", tmp_path / "rows.jsonl", "one\n")
    client = tracking.client()
    run = client.create_run(tracking.open_experiment(publication.EXPERIMENT), run_name="cut version 2")
    client.set_tag(run.info.run_id, "sft.dataset_name", "cut")
    assert publication.find_published("datasets:/cut").version == "1"
    assert _publish("cut", tmp_path / "rows.jsonl", "two\n").version == "2"


def test_an_address_in_a_config_is_read_as_the_files_were(tmp_path: Path, tracked: Path) -> None:
    file = tmp_path / "test.jsonl"  # in a folder, a file of this name would be held out
    published = _publish("read", file, '{"prompt": "a", "completion": "b"}\n')
    config = DataConfig(source="datasets:/read", eval_source="datasets:/read/1")
    pinned = sources.pin_sources(config)
    assert (pinned.source, pinned.eval_source) == ("datasets:/read/1", "datasets:/read/1")
    tracking.resolve(published).rename(tracked / "as on another machine")
    brought = sources.bring_sources(pinned)
    assert Path(brought.source).read_text() == file.read_text()
    local = DataConfig(source=str(file), eval_source=str(file))
    assert digest_source(brought) == digest_source(local)
    assert sources.bring_sources(local) == local


def test_what_is_not_published_is_named_with_what_is(tmp_path: Path) -> None:
    _publish("known", tmp_path / "rows.jsonl", "one\n")
    with pytest.raises(publication.PublicationError, match="versions are 1"):
        publication.find_published("datasets:/known/2")
    with pytest.raises(publication.PublicationError, match="no version of unknown is"):
        publication.find_published("datasets:/unknown")
    with pytest.raises(publication.PublicationError, match="write datasets:/NAME"):
        publication.find_published("datasets:/a/b/c")
    with pytest.raises(publication.PublicationError, match="--name 'a/b'"):
        _publish("a/b", tmp_path / "rows.jsonl", "one\n")


@pytest.mark.parametrize(
    ("source", "name"), [("a/rows.jsonl", "rows"), ("org/Chats v2", "Chats-v2"), ("x/tulu.sft.parquet", "tulu")]
)
def test_a_name_is_made_from_the_path(source: str, name: str) -> None:
    assert publication.make_name(source) == name
