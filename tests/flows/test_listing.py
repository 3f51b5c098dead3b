"""`sft runs` and `sft models` say what MLflow holds, in text and as JSON."""

import json
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks import storage, tracking
from tasks.registry.exports import FORM_TAG
from tasks.registry.versions import GATE_TAG, REASONS_TAG, ROLLED_BACK_TAG, RUN_TAG


@pytest.fixture(autouse=True, scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    folder = tmp_path_factory.mktemp("listing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(folder / "home"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield _fill(folder)


def _fill(folder: Path) -> list[str]:
    client = tracking.client()
    experiment = tracking.open_experiment("listing")
    client.create_run(experiment, run_name="a stage, no run of the pipeline")
    ids = []
    client.create_registered_model("support")
    for number, rate in ((1, "0.001"), (2, "0.002")):
        tags = {tracking.CONFIG_TAG: "x", "sft.version": f"support/{number}", "sft.verdict": "promoted"}
        run = client.create_run(experiment, run_name=f"[bold]run {number}", tags=tags, start_time=1000 * number)
        client.log_param(run.info.run_id, "training.learning_rate", rate)
        client.log_param(run.info.run_id, "training.rank", "8")
        client.log_metric(run.info.run_id, "after/nll", 1.0 / number)
        client.update_run(run.info.run_id, status="FINISHED")
        ids.append(run.info.run_id)
        version = {RUN_TAG: run.info.run_id, GATE_TAG: "promoted", REASONS_TAG: "nll fell", "sft.base_model": "base"}
        client.create_model_version("support", source=str(folder), tags=version)
    client.set_model_version_tag("support", "2", ROLLED_BACK_TAG, "too terse")
    client.set_registered_model_alias("support", "champion", "1")
    client.create_registered_model("support-int8")
    tags = {**version, FORM_TAG: "int8", REASONS_TAG: "int8 of support/1: 99 % agree"}  # the verdict is its parent's
    client.create_model_version("support-int8", source=str(folder), tags=tags)
    return ids


def test_an_export_is_not_called_promoted() -> None:
    (export,) = json.loads(run("models", "support-int8", "--json"))
    assert (export["verdict"], export["aliases"]) == ("exported", "")
    assert "exported: int8 of support/1" in run("models", "support-int8")


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_runs_of_the_pipeline_are_listed_newest_first(database: list[str]) -> None:
    lines = run("runs").splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [database[1][:8], database[0][:8]]
    assert "support/2 promoted" in lines[0]
    assert lines[1].strip() == "[bold]run 2"
    assert [row["run"] for row in json.loads(run("runs", "--json", "--limit", "1"))] == [database[1]]


def test_a_failed_run_says_why() -> None:
    client, experiment = tracking.client(), tracking.open_experiment("failing")
    tags = {tracking.CONFIG_TAG: "x", tracking.FAILURE_TAG: "DataError: 7 of 267 rows are rejected"}
    ids = [client.create_run(experiment, tags=tags, start_time=10).info.run_id for _ in range(2)]
    for run_id, status in zip(ids, ("FAILED", "FINISHED"), strict=True):  # the second went on and came to its end
        client.set_terminated(run_id, status=status)
    try:
        rows = {row["run"]: row["failure"] for row in json.loads(run("runs", "--json"))}
        assert [rows[run_id] for run_id in ids] == ["DataError: 7 of 267 rows are rejected", ""]
        assert run("runs").count("DataError: 7 of 267 rows are rejected") == 1
    finally:
        for run_id in ids:
            client.delete_run(run_id)


def test_a_run_that_was_cut_short_is_interrupted() -> None:
    client, experiment = tracking.client(), tracking.open_experiment("cut-short")
    tags = {tracking.CONFIG_TAG: "x", tracking.HOST_TAG: platform.node()}
    gone, held, stopped = (client.create_run(experiment, tags=tags, start_time=10).info.run_id for _ in range(3))
    elsewhere = client.create_run(experiment, tags={**tags, tracking.HOST_TAG: "elsewhere"}, start_time=10).info.run_id
    client.set_terminated(stopped, status="KILLED")
    try:
        with storage.hold_run(held):
            rows = {row["run"]: row["is_interrupted"] for row in json.loads(run("runs", "--json"))}
            words = {line.split()[0]: line.split()[3] for line in run("runs").splitlines() if not line.startswith(" ")}
        assert {name for name, is_interrupted in rows.items() if is_interrupted} == {gone, stopped}
        assert words[gone[:8]] == words[stopped[:8]] == "interrupted"
        assert words[held[:8]] == words[elsewhere[:8]] == "running"
    finally:
        for run_id in (gone, held, stopped, elsewhere):
            client.delete_run(run_id)


def test_runs_are_compared_in_what_differs(database: list[str]) -> None:
    text = run("runs", database[0], database[1][:12])
    assert "training.learning_rate" in text
    assert "training.rank" not in text
    values = json.loads(run("runs", *database, "--json"))
    assert values["settings"] == {"training.learning_rate": ["0.001", "0.002"]}
    assert values["metrics"]["after/nll"] == [1.0, 0.5]


def test_models_say_why(database: list[str]) -> None:
    rows = json.loads(run("models", "support", "--json"))
    assert [(row["version"], row["aliases"], row["verdict"], row["reasons"]) for row in rows] == [
        ("support/2", "", "rolled back", "too terse"),
        ("support/1", "champion", "promoted", "nll fell"),
    ]
    assert run("models").splitlines()[2].startswith("support/1  champion")


@pytest.mark.parametrize(
    ("words", "message"),
    [(("models", "other"), "there are: support"), (("runs", "zz"), "run zz: not known; `sft runs` lists them")],
)
def test_unknown_names_are_told(words: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", " ")


def test_version_is_the_packages() -> None:
    assert run("--version").startswith("sft-pipeline 0.")
