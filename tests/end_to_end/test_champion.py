"""A new version has to beat the champion on the same rows, and takes its place only then."""

import json
from typing import Any

import polars as pl
import pytest

from schemas.artifacts import ComparisonReport, RunReport
from tasks import tracking
from tasks.registration.audit import read_moves
from tests.end_to_end.conftest import RunPipeline

pytestmark = pytest.mark.slow
_NAME = "rivals"


def _rows(first: int, end: int) -> list[dict[str, str]]:
    return [{"prompt": f"Say {n}.", "completion": f"The number {n}."} for n in range(first, end)]


@pytest.fixture(scope="module")
def reports(run_pipeline: RunPipeline, tmp_path_factory: pytest.TempPathFactory) -> list[RunReport]:
    """Three runs: a first version, a better one on the same rows, and a hardly trained one on other rows."""
    folder = tmp_path_factory.mktemp("rivals")

    def run(rows: list[dict[str, str]], max_steps: int) -> RunReport:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings: dict[str, Any] = {
            "data": {"source": str(folder / "rows.jsonl"), "eval_fraction": 0.5},
            "training": {"rank": 8, "alpha": 16, "max_steps": max_steps, "micro_batch": 8, "learning_rate": 2e-3},
            "registry": {"name": _NAME, "gate": {"metric": "nll"}},
        }
        return run_pipeline(settings)

    return [run(_rows(0, 40), 4), run(_rows(0, 40), 16), run(_rows(30, 70), 1)]


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
    assert champion.notes == ("rows of its own run",)
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
    moves = read_moves(_NAME)
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
