"""What was done is noted and read again; what hinders the note ends nothing."""

import json
import logging
from pathlib import Path

import pytest

from tasks import speeds
from tasks.speeds import Speed, Timing, describe_shape, note, read_speeds

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "base_model"


def test_notes_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    assert read_speeds() == []
    first = Speed("merge", 1, 2.5, "CPU", shape="a", peak_memory_bytes=7)
    note(first)
    Timing().note("ingest", 100, device="CPU", settings="{}")
    file = tmp_path / "home" / "speeds.jsonl"
    with file.open("a") as out:
        out.write('{"stage": "of another release"}\nnot JSON\n{"stage": "cut sho')
    found = read_speeds()
    assert found[0] == first
    assert [each.stage for each in found] == ["merge", "ingest"]
    assert found[1].seconds > 0


def test_the_file_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path))
    monkeypatch.setattr(speeds, "_MOST_BYTES", 5000)
    for number in range(1, 200):
        note(Speed("merge", number, 1.0, "CPU"))
    assert (tmp_path / "speeds.jsonl").stat().st_size < 6000
    assert read_speeds()[-1].units == 199


def test_a_home_that_takes_nothing_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "speeds.jsonl").mkdir()
    with caplog.at_level(logging.WARNING):
        note(Speed("merge", 1, 1.0, "CPU"))
    assert "How long merge took is not noted" in caplog.text
    assert read_speeds() == []


def test_a_shape_is_the_sizes_and_not_the_name(tmp_path: Path) -> None:
    shape = describe_shape(MODEL)
    values = json.loads((MODEL / "config.json").read_text())
    assert shape.startswith(f"{values['model_type']} num_hidden_layers={values['num_hidden_layers']} ")
    (tmp_path / "config.json").write_text(json.dumps({**values, "transformers_version": "6", "_name_or_path": "x"}))
    assert describe_shape(tmp_path) == shape
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_size": 7}))
    assert describe_shape(tmp_path) != shape
    assert describe_shape(tmp_path / "nowhere") == ""
