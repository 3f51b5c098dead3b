"""The demo keeps its promise, and its labels are exactly the answers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.artifacts import RunReport
from tasks import tracking
from tasks.models import load_tokenizer
from tests.end_to_end.reader import Reader

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(reader: Reader) -> Iterator[RunReport]:
    """What `make demo` has left in its home."""
    reader.type("make demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(reader.folder / ".sft"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        version = tracking.client().get_model_version("demo-assistant", "1")
        yield RunReport.model_validate_json(_read(version.tags["sft.run"], "run_report.json"))


def test_the_model_learns_to_answer_what_no_training_row_asks(report: RunReport) -> None:
    evaluation = report.evaluation
    assert evaluation.num_examples >= 150
    assert evaluation.before["exact_match"] < 0.05
    assert evaluation.after["exact_match"] >= 0.8
    assert evaluation.delta["exact_match"].ci_low > 0.5


def test_every_row_of_the_demo_is_accounted_for(report: RunReport) -> None:
    rows = report.dataset
    assert (rows.rows_in, rows.rows_train, rows.rows_eval) == (1103, 885, 205)
    assert rows.rows_rejected == {"empty_answer": 3, "missing_field": 2}
    assert (rows.rows_duplicate, rows.rows_leaked) == (6, 2)
    assert report.tokens.examples == 885


def test_the_merged_model_is_the_one_that_was_trained(report: RunReport) -> None:
    assert report.merge.max_abs_logit_diff < 1e-3
    assert report.merge.greedy_agreement == 1.0
    assert report.merge.differs_from_base


def test_the_gate_makes_it_champion(report: RunReport) -> None:
    entry = report.registry
    assert (entry.name, entry.version, entry.verdict) == ("demo-assistant", "1", "promoted")
    assert entry.aliases == ("challenger", "champion")
    version = tracking.client().get_model_version_by_alias("demo-assistant", "champion")
    assert str(version.version) == "1"
    for tag in ("dataset_digest", "base_model", "template_digest", "git_commit", "prefect_flow_run", "run"):
        assert version.tags[f"sft.{tag}"], tag


def test_what_pretraining_taught_is_asked_too(report: RunReport) -> None:
    (probe,) = report.evaluation.probes
    assert (probe.name, probe.num_conversations) == ("running-text", 157)
    assert probe.before < 0.2
    assert probe.after > probe.before  # it forgets a little, and the report says so
    assert any("On probe running-text the fine-tuned model is worse" in words for words in report.evaluation.warnings)
    assert [check.passed for check in report.evaluation.checks if check.kind == "probe"] == [True]


def test_one_parent_run_has_a_finished_child_run_a_stage(report: RunReport) -> None:
    parent = tracking.get_run(report.mlflow_run_id)
    assert parent.info.status == "FINISHED"
    children = tracking.client().search_runs(
        [parent.info.experiment_id], f"tags.`{tracking.PARENT_TAG}` = '{report.mlflow_run_id}'"
    )
    assert {run.data.tags[tracking.STAGE_TAG]: run.info.status for run in children} == dict.fromkeys(
        ("ingest", "tokenize", "probes", "evaluate-base", "train", "merge", "evaluate-merged", "compare", "register"),
        "FINISHED",
    )
    artifacts = {item.path for item in tracking.client().list_artifacts(report.mlflow_run_id)}
    assert artifacts >= {"config.json", "quality", "report", "run_report.json", "side_by_side.json", "gate", "logs"}
    params = {run.data.tags[tracking.STAGE_TAG]: run.data.params for run in children}
    assert params["train"]["rank"] == "64"
    assert params["evaluate-base"]["max_new_tokens"] == "40"
    assert params["compare"]["min_gain"] == "0.5"


def _read(run_id: str, artifact: str) -> str:
    return Path(tracking.client().download_artifacts(run_id, artifact)).read_text()


def test_what_the_gate_said_the_log_and_the_environment_are_with_the_run(report: RunReport) -> None:
    verdict = _read(report.mlflow_run_id, "gate/gate.md")
    assert verdict.startswith(f"# demo-assistant version 1: promoted\n\n{report.evaluation.sentence}\n")
    page = _read(report.mlflow_run_id, "report/report.html")
    for check in report.evaluation.checks:
        assert f"| passed | {check.finding} |" in verdict
        assert check.finding in page
    for warning in report.evaluation.warnings:
        assert warning in verdict
        assert warning in page
    log = _read(report.mlflow_run_id, "logs/run-1.log")
    assert "205 held-out conversations can show a change of 3.9 % in exact_match" in log
    assert "demo-assistant version 1: promoted" in log
    assert re.search(r"^torch==\d", _read(report.mlflow_run_id, "environment/requirements.txt"), re.MULTILINE)


def _folders(report: RunReport) -> tuple[Path, Path]:
    """Return the dataset's and the tokens' folder of the run."""
    found = {}
    experiment = tracking.get_run(report.mlflow_run_id).info.experiment_id
    for run in tracking.client().search_runs([experiment]):
        found[run.data.tags.get(tracking.STAGE_TAG)] = run.info.run_id
    dataset = tracking.client().download_artifacts(found["ingest"], "dataset")
    return Path(dataset), Path(tracking.client().download_artifacts(found["tokenize"], "tokens"))


def test_labels_are_exactly_the_answer_and_its_end_of_turn_for_every_row(report: RunReport) -> None:
    dataset, tokens = _folders(report)
    tokenizer: Any = load_tokenizer(tokens / "tokenizer")
    num_rows = 0
    for part in ("train", "eval"):
        conversations = pl.read_parquet(dataset / f"{part}.parquet")["messages"].to_list()
        examples = pl.read_parquet(tokens / f"{part}.parquet")
        for text, ids, labels in zip(conversations, examples["input_ids"], examples["labels"], strict=True):
            question, answer = json.loads(text)
            trained = [label for label in labels if label != -100]
            prompt = [token for token, label in zip(ids, labels, strict=True) if label == -100]
            assert tokenizer.decode(trained) == f"{answer['content']}<|im_end|>"
            assert (
                tokenizer.decode(prompt)
                == f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
            )
            assert list(ids) == prompt + trained
            num_rows += 1
    assert num_rows == 885 + 205
