"""Data is published, versions have to beat the champion on the same rows, aliases move, and events say so."""

import json
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from prefect.client.orchestration import get_client

from flows.promote import promote
from flows.publish import publish
from flows.rollback import rollback
from schemas.artifacts import ComparisonReport, Published, RunReport
from tasks import tracking
from tasks.registry.audit import list_moves
from tasks.registry.versions import get_model
from tests.end_to_end.conftest import BASE_MODEL, RunPipeline

pytestmark = pytest.mark.slow
_NAME = "rivals"


def _write(file: Path, first: int, end: int) -> str:
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n}."} for n in range(first, end)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rivals")


@pytest.fixture(scope="module")
def published(run_pipeline: RunPipeline, folder: Path) -> list[Published]:
    """The same rows published twice; `run_pipeline` brings the server."""
    file = _write(folder / "numbers.jsonl", 0, 40)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_settings("later", 4)))
    return [
        publish(file, recipe_file=str(recipe), requested_by="ann"),
        publish(file, requested_by="ann"),
    ]


def _settings(source: str, max_steps: int) -> dict[str, Any]:
    return {
        "name": "tests",
        "model": {"base_model": str(BASE_MODEL)},
        "data": {"source": source, "eval_fraction": 0.5},
        "training": {"rank": 8, "alpha": 16, "max_steps": max_steps, "micro_batch": 8, "learning_rate": 2e-3},
        "evaluation": {"batch_size": 32, "max_new_tokens": 8, "num_resamples": 200},
        "registry": {"name": _NAME, "gate": {"metric": "nll", "min_conversations": 8}},
    }


@pytest.fixture(scope="module")
def reports(run_pipeline: RunPipeline, published: list[Published], folder: Path) -> list[RunReport]:
    """Three runs: a first version on what the event names, a better one on it, a hardly trained one on other rows."""
    (event,) = _events("dataset.published")

    address = event["payload"]["uri"]
    # As the trigger starts it: the recipe takes the place of the form's settings.
    form = {"data": {"source": "nothing"}, "registry": {"name": "another"}}
    first = run_pipeline(form, dataset_uri=address, recipe=event["payload"]["name"])
    others = _write(folder / "others.jsonl", 30, 70)
    return [first, run_pipeline(_settings(address, 16)), run_pipeline(_settings(others, 1))]


def _events(name: str) -> list[dict[str, Any]]:
    """Return the events of this name; the server writes them down some seconds after it took them."""
    body = {"filter": {"event": {"name": [name]}, "order": "ASC"}, "limit": 50}
    end = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while True:
            found: list[dict[str, Any]] = client.request("POST", "/events/filter", json=body).json()["events"]
            if found or time.monotonic() > end:
                return found
            time.sleep(0.5)


def test_new_content_is_announced_once_with_its_address(published: list[Published]) -> None:
    assert [entry.is_new for entry in published] == [True, False]
    (event,) = _events("dataset.published")
    assert event["resource"]["prefect.resource.id"] == "dataset.numbers"
    assert event["payload"]["uri"] == published[0].address == "datasets:/numbers/1"
    assert event["payload"]["digest"] == published[0].digest
    assert event["resource"]["sft.recipe"] == "yes"


def test_a_run_on_the_published_address_is_named_by_it_and_has_all_rows(reports: list[RunReport]) -> None:
    assert reports[0].dataset.rows_in == 40
    run = tracking.get_run(reports[0].mlflow_run_id)
    assert "base_model on numbers/1, 20" in run.info.run_name
    assert run.data.params["data.source"] == "datasets:/numbers/1"


def test_the_files_of_the_dataset_are_kept_with_their_check(published: list[Published]) -> None:
    folder = Path(tracking.client().download_artifacts(str(published[0].mlflow_run_id), ""))
    assert len((folder / "data" / "numbers.jsonl").read_text().splitlines()) == 40
    assert json.loads((folder / "check.json").read_text())["rows"]["rows in"] == 40


def _stages(report: RunReport) -> set[str]:
    client, parent = tracking.client(), tracking.get_run(report.mlflow_run_id)
    query = f"tags.`{tracking.PARENT_TAG}` = '{report.mlflow_run_id}'"
    runs = client.search_runs([parent.info.experiment_id], query)
    return {run.data.tags[tracking.STAGE_TAG] for run in runs}


def test_the_first_version_is_compared_with_the_base_only(reports: list[RunReport]) -> None:
    assert reports[0].registry.verdict == "promoted", reports[0].registry.reasons
    assert reports[0].evaluation.champion is None
    assert reports[0].registry.aliases == ("challenger", "champion")


def test_a_better_version_on_the_same_rows_takes_the_place_without_asking_the_champion_again(
    reports: list[RunReport],
) -> None:
    entry, champion = reports[1].registry, reports[1].evaluation.champion
    assert champion is not None
    assert (champion.version, champion.num_seen) == ("1", 0)
    assert champion.num_examples == reports[1].evaluation.num_examples
    assert champion.metrics == reports[0].evaluation.after
    assert champion.notes == ("measured in its own run",)
    assert "evaluate-champion" not in _stages(reports[1])
    assert (entry.verdict, entry.previous) == ("promoted", "1")
    assert [words.split(" (")[0].split(" over ")[1] for words in entry.reasons] == [
        "the base model",
        "champion version 1",
    ]


def test_on_other_rows_the_champion_answers_again_but_only_what_it_was_not_trained_on_counts(
    reports: list[RunReport],
) -> None:
    entry, champion = reports[2].registry, reports[2].evaluation.champion
    assert champion is not None
    assert champion.version == "2"
    assert "evaluate-champion" in _stages(reports[2])
    assert champion.num_seen > 0
    assert champion.num_seen + champion.num_examples == reports[2].evaluation.num_examples
    assert (entry.verdict, entry.aliases) == ("refused", ("challenger",))
    assert "champion version 2" in entry.reasons[-1]
    comparison = tracking.recall(reports[2].mlflow_run_id, "compare", ComparisonReport)
    assert comparison is not None
    folder = tracking.resolve(comparison)
    table = pl.read_parquet(folder / "table.parquet")
    assert table.height == reports[2].evaluation.num_examples
    assert table["answer_champion"].null_count() == 0
    assert "Champion<br>(version 2)" in (folder / "report.html").read_text()


def test_the_trail_and_the_aliases_tell_the_same_story(reports: list[RunReport]) -> None:
    moves = list_moves(get_model(_NAME))
    assert [(move.version_from, move.version_to) for move in moves] == [(None, "1"), ("1", "2")]
    assert moves[1].evidence["mlflow_run"] == reports[1].mlflow_run_id
    aliases = tracking.client().get_registered_model(_NAME).aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {
        "challenger": "3",
        "champion": "2",
        "previous": "1",
    }
    description = str(tracking.client().get_model_version(_NAME, "2").description)
    assert "| nll |" in description
    assert "Against champion version 1, on " in description
    assert reports[1].mlflow_run_id in description


def test_the_flows_move_the_champion_and_tell_who_waits(reports: list[RunReport]) -> None:
    with pytest.raises(ValueError, match="the gate refused it"):
        promote(_NAME)
    promote(_NAME, reason="to see it in use", force=True, requested_by="ann")
    rollback(_NAME, reason="seen enough", requested_by="bob")
    moves = list_moves(get_model(_NAME))[2:]
    assert [(move.action, move.version_from, move.version_to, move.why) for move in moves] == [
        ("promote", "2", "3", "to see it in use"),
        ("rollback", "3", "2", "seen enough"),
    ]
    assert moves[1].who.startswith("bob by Prefect run ")
    assert [event["payload"]["uri"] for event in _events("model.promote")] == [f"models:/{_NAME}/3"]
    assert [event["payload"]["version"] for event in _events("model.rollback")] == ["2"]
