"""Published data is checked and trained by the recipe of its own name; without one nothing starts."""

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.events.schemas.events import Resource, ResourceSpecification

from flows.pipeline import choose_config
from flows.publish import Outcome, describe_event, describe_recipe, labels_of, publish_now
from flows.service.deployments import read_deployments
from schemas.config import RunConfig
from schemas.loading import parse_config
from tasks.registry.publication import PublicationError, find_published
from tasks.registry.recipes import find_recipe, keep_recipe, need_recipe

_BASE_MODEL = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "base_model"


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _write(file: Path, first: int, end: int) -> str:
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n}."} for n in range(first, end)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _config(folder: Path, **data: Any) -> RunConfig:
    return parse_config(
        {
            "name": "support",
            "model": {"base_model": str(_BASE_MODEL)},
            "data": {"source": "later", "eval_source": _write(folder / "held.jsonl", 900, 940), **data},
            "registry": {"name": "support-assistant"},
        }
    )


def _starts_a_run(outcome: Outcome) -> bool:
    """Tell whether the trigger of the deployment that trains takes the event of such a dataset."""
    (deployment,) = (each for each in read_deployments() if each["name"] == "sft-pipeline")
    (trigger,) = deployment["triggers"]
    labels = {"prefect.resource.id": f"dataset.{outcome.published.name}", **labels_of(outcome)}
    return ResourceSpecification.model_validate(trigger["match"]).matches(Resource.model_validate(labels))


def test_a_dataset_with_a_recipe_starts_its_own_run(tmp_path: Path) -> None:
    file = _write(tmp_path / "chats.jsonl", 0, 40)
    outcome = publish_now(file, name="support", recipe=_config(tmp_path), settings=None, who="ann")
    assert outcome.published.address == "datasets:/support/1"
    assert _starts_a_run(outcome)
    assert describe_event(outcome, "there").endswith("sent to there: a run starts on it")
    assert describe_recipe(outcome).endswith("held out datasets:/support-held-out/1, registered as support-assistant")
    # What the started run takes: nothing of the form, which begins with the demo.
    form = parse_config({"model": {"base_model": "demo"}, "data": {"source": "demo"}, "registry": {"name": "demo"}})
    config = choose_config(form, "support", {"dataset_uri": outcome.published.address})
    assert (config.data.source, config.data.eval_source) == ("datasets:/support/1", "datasets:/support-held-out/1")
    assert (config.registry.name, config.model.base_model) == ("support-assistant", str(_BASE_MODEL))
    assert find_published("datasets:/support-held-out").version == "1"


def test_later_data_is_checked_by_the_recipe_of_its_name(tmp_path: Path) -> None:
    first = _write(tmp_path / "chats.jsonl", 0, 40)
    publish_now(first, name="support", recipe=_config(tmp_path, max_rejected_fraction=0.01), settings=None, who="ann")
    broken = tmp_path / "more.jsonl"
    broken.write_text(Path(first).read_text() + '{"prompt": "x", "completion": ""}\n' * 5)
    with pytest.raises(PublicationError, match=r"data.max_rejected_fraction allows 1.00%"):
        publish_now(str(broken), name="support", recipe=None, settings=None, who="ann")
    # Held-out rows among the new ones are the leaks that the run would find.
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(
        Path(_write(tmp_path / "a.jsonl", 100, 140)).read_text() + Path(tmp_path / "held.jsonl").read_text()
    )
    assert publish_now(str(mixed), name="support", recipe=None, settings=None, who="ann").check.rows["leaked"] == 40
    settings = parse_config({"model": {"base_model": str(_BASE_MODEL)}, "data": {"source": str(mixed)}})
    with pytest.raises(PublicationError, match="dataset support has a recipe, and is checked with it"):
        publish_now(str(mixed), name="support", recipe=None, settings=settings, who="ann", settings_chosen=True)


def test_without_a_recipe_it_says_so_and_starts_nothing(tmp_path: Path) -> None:
    file = _write(tmp_path / "chats.jsonl", 0, 40)
    settings = parse_config({"model": {"base_model": str(_BASE_MODEL)}, "data": {"source": file}})
    outcome = publish_now(file, name="", recipe=None, settings=settings, who="ann")
    assert outcome.published.address == "datasets:/chats/1"
    assert not _starts_a_run(outcome)
    assert describe_event(outcome, "there").endswith("no run starts on it")
    assert (
        describe_recipe(outcome)
        == "chats has no recipe, so that no run starts on it: give it one with --recipe my.yaml"
    )
    with pytest.raises(PublicationError, match=r"dataset chats has no recipe at .*--recipe my\.yaml"):
        choose_config(settings, "chats", {"dataset_uri": outcome.published.address})
    with pytest.raises(PublicationError, match="nothing says how to check it"):
        publish_now(file, name="chats", recipe=None, settings=None, who="ann")


def test_the_same_recipe_is_kept_once_and_the_newest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "held.jsonl", 900, 940)
    values = {"model": {"base_model": str(_BASE_MODEL)}, "data": {"source": "x", "eval_source": "held.jsonl"}}
    first = keep_recipe("kept", parse_config(values), who="ann")
    assert keep_recipe("kept", parse_config(values), who="bob").number == first.number == 1
    assert keep_recipe("kept", parse_config({**values, "seed": 3}), who="ann").number == 2
    assert need_recipe("kept").config.seed == 3
    assert need_recipe("kept").config.data.source == "datasets:/kept"
    # A worker starts elsewhere.
    assert need_recipe("kept").config.data.eval_source == str(tmp_path / "held.jsonl")
    assert find_recipe("other") is None
