"""All rows are trained and none is held out: the gate says that it cannot judge, and questions are still asked."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.terminal import show_outcome
from schemas.artifacts import ComparisonReport, MergedRef, RunReport
from tasks import tracking
from tests.end_to_end.conftest import RunPipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("asks", [True, False], ids=["questions and a probe", "nothing is asked"])
def test_every_row_is_trained_and_the_version_stays_challenger(
    run_pipeline: RunPipeline,
    tmp_path: Path,
    asks: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = [{"prompt": f"Count to {n}.", "completion": f"{n}, {n}."} for n in range(35)]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probe))
    evaluation: dict[str, Any] = {"max_new_tokens": 8, "num_resamples": 100}
    if asks:
        evaluation |= {
            "questions": ["Say 7."],
            "probes": [{"name": "counting", "source": str(tmp_path / "probe.jsonl"), "max_loss": 1000}],
        }
    report = run_pipeline(
        {
            "name": "all-rows",
            "data": {"source": str(tmp_path / "rows.jsonl"), "eval_fraction": 0},
            "training": {"rank": 4, "num_epochs": 2, "micro_batch": 4, "learning_rate": 1e-3},
            "evaluation": evaluation,
            "registry": {"name": f"all-rows-{asks}".lower()},
        }
    )
    _check_report(report)
    _check_comparison(report, asks=asks)
    show_outcome(report)
    shown = capsys.readouterr().out
    assert "No row was held out" in shown
    assert "held-out rows" not in shown
    assert ("The same questions to both" in shown) == asks
    first, *others = report.evaluation.warnings
    monkeypatch.setattr("flows.terminal._warned", {first})  # of a line of the log
    show_outcome(report, only_verdict=True)
    verdict = " ".join(capsys.readouterr().out.split())
    assert "in the registry: refused" in verdict
    assert others
    assert first not in verdict
    assert all(f"warning: {other}" in verdict for other in others)
    assert "Took" not in verdict


def _check_report(report: RunReport) -> None:
    """What a run says of itself."""
    assert (report.dataset.rows_in, report.dataset.rows_train, report.dataset.rows_eval) == (40, 40, 0)
    assert report.training.steps == 20
    assert report.evaluation.num_examples == 0
    assert [len(found) for found in (report.evaluation.before, report.evaluation.after, report.evaluation.delta)] == [
        0
    ] * 3
    assert report.evaluation.sentence.startswith("No row was held out")
    assert report.registry.verdict == "refused"
    assert report.registry.aliases == ("challenger",)
    (reason,) = report.registry.reasons
    assert reason.startswith("the gate cannot judge: no conversation was held out")
    assert any("it stays challenger. Hold out a part" in warning for warning in report.evaluation.warnings)
    assert report.merge.greedy_agreement == 1.0  # proven on trained prompts
    assert tracking.recall(report.mlflow_run_id, "merge", MergedRef) is not None


def _check_comparison(report: RunReport, *, asks: bool) -> None:
    """What it leaves for people to look at."""
    comparison = tracking.recall(report.mlflow_run_id, "compare", ComparisonReport)
    assert comparison is not None
    folder = tracking.resolve(comparison)
    assert pl.read_parquet(folder / "table.parquet").is_empty()
    asked = json.loads((folder / "questions.json").read_text())
    assert [entry["question"] for entry in asked] == (["Say 7."] if asks else [])
    assert [probe.num_conversations for probe in comparison.probes] == ([35] if asks else [])
    of_probes = f"tags.`sft.stage` = 'probes' and tags.`mlflow.parentRunId` = '{report.mlflow_run_id}'"
    experiment = str(tracking.get_run(report.mlflow_run_id).info.experiment_id)
    found = tracking.client().search_runs([experiment], of_probes)
    assert [run.data.params["probes.counting.max_loss"] for run in found] == (["1000.0"] if asks else [])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "No row was held out" in page
    assert "All measures" not in page


def test_a_second_version_does_not_replace_a_champion_without_held_out_rows(
    run_pipeline: RunPipeline, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "name": "two-versions",
        "data": {"source": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.6},
        "training": {"rank": 8, "num_epochs": 3, "micro_batch": 4, "learning_rate": 3e-3},
        "evaluation": {"max_new_tokens": 8, "num_resamples": 100},
        "registry": {"name": "two-versions", "gate": {"guards": {"repetition_rate": None, "chrf": None}}},
    }
    first = run_pipeline(settings)
    assert first.registry.verdict == "promoted", first.registry.reasons
    second = run_pipeline({**settings, "data": {**settings["data"], "eval_fraction": 0}})
    assert second.registry.verdict == "refused"
    assert second.evaluation.champion is not None
    assert second.evaluation.champion.version == first.registry.version
    assert any("no row is held out that both could answer" in reason for reason in second.registry.reasons)
