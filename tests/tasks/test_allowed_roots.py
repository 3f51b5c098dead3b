"""Runs of the service read below its roots only, links followed; a run by hand reads what its person may read."""

import json
import os
from pathlib import Path

import pytest

from flows.publish import publish
from schemas.config import DatasetConfig, ModelConfig
from tasks.allowed_roots import LIMITED, ROOTS, OutsideRootsError, check_allowed
from tasks.base_model import locate_base_model, locate_tokenizer
from tasks.ingestion.sources.sources import find_sources

_ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the service may read; beside it lies one that it may not."""
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(_ROW)
    monkeypatch.setenv(LIMITED, "1")
    monkeypatch.setenv(ROOTS, os.pathsep.join([str(tmp_path / "elsewhere"), str(tmp_path / "inside")]))
    monkeypatch.chdir(tmp_path / "inside")
    return tmp_path / "inside"


def _find(source: str | Path) -> list[Path]:
    return [file.path for found in find_sources(DatasetConfig(source=str(source))) for file in found.files]


def test_what_lies_below_a_root_is_read(inside: Path) -> None:
    assert _find(inside / "rows.jsonl") == [inside / "rows.jsonl"]
    assert _find("rows.jsonl") == [Path("rows.jsonl")]
    assert _find(inside) == [inside / "rows.jsonl"]


@pytest.mark.parametrize(
    "source",
    [
        "{0}/outside/rows.jsonl",
        "{0}/outside",
        "../outside/rows.jsonl",
        "/etc/passwd",
        "~/secrets.jsonl",
        "{0}/missing.jsonl",
        "/proc",
    ],
)
def test_what_does_not_is_refused_whether_it_is_there_or_not(inside: Path, source: str) -> None:
    with pytest.raises(OutsideRootsError, match=f"is not below .*elsewhere or {inside}: .*{ROOTS}"):
        _find(source.format(inside.parent))


def test_links_and_indexes_lead_nowhere_else(inside: Path) -> None:
    (inside / "link.jsonl").symlink_to(inside.parent / "outside" / "rows.jsonl")
    (inside / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "../outside/rows.jsonl"}}))
    for source in (inside / "link.jsonl", inside, inside / "dataset_info.json#a"):
        with pytest.raises(OutsideRootsError):
            _find(source)


def test_models_are_limited_too(inside: Path) -> None:
    for locate in (locate_base_model, locate_tokenizer):
        with pytest.raises(OutsideRootsError, match=r"model\.base_model"):
            locate(ModelConfig(base_model=str(inside.parent / "outside")))
    assert locate_tokenizer(ModelConfig(base_model=str(inside))) == inside


@pytest.mark.parametrize("name", ["tokenizer_config.json", "additional_chat_templates/tools.jinja", "templates"])
def test_links_in_a_model_lead_nowhere_else(inside: Path, name: str) -> None:
    model = inside / "model"
    (model / name).parent.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "qwen3"}')
    (model / name).symlink_to(inside.parent / "outside" / ("" if name == "templates" else "rows.jsonl"))
    for locate in (locate_base_model, locate_tokenizer):
        with pytest.raises(OutsideRootsError, match=name.rpartition("/")[2]):
            locate(ModelConfig(base_model=str(model)))


def test_nobody_learns_what_the_system_says_of_a_place_outside(inside: Path) -> None:
    outside = inside.parent / "outside"
    (outside / "loop").symlink_to(outside / "loop")
    for name in ("x" * 300, "rows.jsonl/x", "loop"):
        for read in (lambda place: locate_base_model(ModelConfig(base_model=str(place))), _find):
            with pytest.raises(OutsideRootsError):
                read(outside / name)


def test_a_recipe_of_the_publish_form_is_limited_too(inside: Path) -> None:
    with pytest.raises(OutsideRootsError, match="recipe_file"):
        publish.fn("rows.jsonl", recipe_file=str(inside.parent / "outside" / "recipe.yaml"))


def test_a_run_by_hand_reads_anything(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMITED)
    assert _find("../outside/rows.jsonl") == [Path("../outside/rows.jsonl")]


def test_without_roots_they_are_the_home_and_the_working_folder(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROOTS)
    monkeypatch.setenv("SFT_HOME", str(inside.parent / "home"))
    check_allowed(inside.parent / "home" / "cache" / "x", "data.source")
    check_allowed(inside / "rows.jsonl", "data.source")
    with pytest.raises(OutsideRootsError):
        check_allowed(inside.parent / "outside", "data.source")
