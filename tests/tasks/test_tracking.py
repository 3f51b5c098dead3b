"""One parent run, one child run a stage, and artifacts that are what their digest says."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.artifacts import EvalReport, Ref
from schemas.config import GateConfig, RunConfig
from schemas.loading import parse_config
from tasks import storage, tracking

pytestmark = pytest.mark.usefixtures("tracked")
_CONFIG = parse_config({"name": "law", "model": {"base_model": "base"}, "data": {"source": "rows.jsonl"}})


def _parent(config: RunConfig = _CONFIG) -> str:
    return tracking.create_parent_run(config, run_name="base on rows", config_digest="c" * 64, tags={})


@pytest.fixture
def parent() -> Iterator[str]:
    run_id = _parent()
    yield run_id
    tracking.end_run(run_id, "FINISHED")


def test_the_resolved_config_is_recorded_whole(parent: str) -> None:
    assert tracking.recorded_config(parent) == _CONFIG.model_dump(mode="json")
    assert tracking.get_run(parent).data.params["training.rank"] == "64"


def test_a_second_attempt_of_a_stage_goes_on_in_the_same_child_run(parent: str) -> None:
    with pytest.raises(RuntimeError), tracking.stage_run(parent, "train") as first:
        raise RuntimeError
    assert tracking.get_run(first).info.status == "FAILED"
    with tracking.stage_run(parent, "train") as second:
        assert tracking.get_run(second).info.status == "RUNNING"
    assert second == first
    assert tracking.get_run(first).info.status == "FINISHED"
    assert tracking.get_run(first).data.tags[tracking.PARENT_TAG] == parent


def test_only_unfinished_parent_runs_count_as_interrupted(parent: str) -> None:
    killed = _parent()
    tracking.end_run(killed, "KILLED")
    failed = _parent()
    tracking.end_run(failed, "FAILED")
    with tracking.stage_run(parent, "ingest"):
        found = [run.info.run_id for run in tracking.find_interrupted_runs("law")]
    assert set(found) >= {parent, killed}
    assert failed not in found
    assert len(found) == len({*found})
    assert tracking.find_interrupted_runs("no such experiment") == []


def test_a_finished_stage_is_recalled_and_an_unfinished_one_is_not(parent: str) -> None:
    kept = _publish(parent, "rows of an evaluation")
    ref = EvalReport(**kept.model_dump(), model_digest="m", conditions="c", num_examples=3, metrics={"nll": 1.5})
    with tracking.stage_run(parent, "evaluate") as run_id:
        tracking.remember(run_id, ref)
        assert tracking.recall(parent, "evaluate", EvalReport) is None
    assert tracking.recall(parent, "evaluate", EvalReport) == ref
    assert tracking.recall(parent, "merge", EvalReport) is None


def test_a_finished_stage_whose_files_are_lost_is_not_recalled(
    parent: str, tracked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ref = _publish(parent, "to be lost")
    with tracking.stage_run(parent, "merge") as run_id:
        tracking.remember(run_id, ref)
    tracking.resolve(ref).rename(tracked / "away")
    assert tracking.recall(parent, "merge", Ref) == ref
    for stored in (tracked / "artifacts").rglob("rows.txt"):
        if stored.read_text() == "to be lost":
            stored.unlink()
    tracking.resolve(ref).rename(tracked / "away too")
    assert tracking.recall(parent, "merge", Ref) is None
    assert "Stage merge runs again, its result is lost" in caplog.text


def _publish(parent: str, text: str) -> Ref:
    with tracking.stage_run(parent, "ingest") as run_id, storage.new_folder() as folder:
        (folder / "data").mkdir()
        (folder / "data" / "rows.txt").write_text(text)
        uri, digest = tracking.publish(folder / "data", run_id, "data")
    return Ref(uri=uri, digest=digest)


def test_an_artifact_is_free_on_this_machine_and_fetched_on_another(parent: str, tracked: Path) -> None:
    ref = _publish(parent, "hello")
    here = tracking.resolve(ref)
    assert here.is_relative_to(tracked / "cache")
    here.rename(tracked / "elsewhere")  # as on a machine with an empty cache
    assert (tracking.resolve(ref) / "rows.txt").read_text() == "hello"


def test_a_changed_artifact_is_refused(parent: str, tracked: Path) -> None:
    ref = _publish(parent, "to be changed")
    tracking.resolve(ref).rename(tracked / "moved")
    (stored,) = [path for path in (tracked / "artifacts").rglob("rows.txt") if path.read_text() == "to be changed"]
    stored.write_text("changed")
    with pytest.raises(tracking.ArtifactError, match="it was changed or cut short"):
        tracking.resolve(ref)


def test_a_deleted_artifact_names_address_and_remedy(parent: str) -> None:
    ref = Ref(uri=f"runs:/{parent}/gone", digest="e" * 64)
    with pytest.raises(tracking.ArtifactError, match="start the run again, which makes it again"):
        tracking.resolve(ref)


def test_an_unknown_run_is_named() -> None:
    with pytest.raises(ValueError, match="MLflow run 'nosuchrun' is not known"):
        tracking.get_run("nosuchrun")


def test_curves_come_back_with_evaluations_where_they_were(parent: str) -> None:
    with tracking.stage_run(parent, "train") as run_id, tracking.metric_log(run_id) as log:
        for step in range(1, 5):
            log(step, {"train/loss": 1.0 / step})
        log(4, {"eval/loss": 0.5})
    assert tracking.training_curves(run_id) == [(1, 1.0, None), (2, 0.5, None), (3, 1.0 / 3, None), (4, 0.25, 0.5)]


def test_another_home_is_another_database_and_the_environment_stays(
    parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: Path
) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "other"))
    other = _parent()
    assert "MLFLOW_TRACKING_URI" not in os.environ
    with pytest.raises(ValueError, match="is not known"):
        tracking.get_run(parent)
    monkeypatch.setenv("SFT_HOME", str(tracked))
    assert tracking.get_run(parent).info.run_id == parent
    with pytest.raises(ValueError, match="is not known"):
        tracking.get_run(other)


def test_a_stage_says_how_much_of_it_was_tracking(parent: str) -> None:
    with tracking.stage_run(parent, "train") as run_id:
        time.sleep(0.3)
        with tracking.tracking_time(), tracking.tracking_time():  # counted once
            time.sleep(0.5)
    metrics = tracking.get_run(run_id).data.metrics
    assert 0.5 <= metrics["stage/tracking_seconds"] < 1.0
    assert metrics["stage/seconds"] >= metrics["stage/tracking_seconds"] + 0.3


def test_calls_to_a_server_meet_and_their_first_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    meeting = threading.Barrier(2)
    assert sorted(tracking.at_once(*(lambda: meeting.wait(timeout=30) for _ in range(2)))) == [0, 1]
    assert tracking.at_once(lambda: "a", lambda: "b", lambda: "c") == ["a", "b", "c"]
    done: list[str] = []
    with pytest.raises(ZeroDivisionError):
        tracking.at_once(lambda: 1 / 0, lambda: done.append("all the same"))
    assert done == ["all the same"]


def test_calls_to_a_local_database_follow_each_other() -> None:
    threads = tracking.at_once(threading.get_ident, threading.get_ident)
    assert threads == [threading.get_ident()] * 2


def test_a_stage_carries_its_settings_and_its_experiment_its_kind(parent: str) -> None:
    with tracking.stage_run(parent, "gate", GateConfig(metric="chrf")) as run_id:
        pass
    assert tracking.get_run(run_id).data.params["metric"] == "chrf"
    experiment = tracking.client().get_experiment(tracking.get_run(run_id).info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_an_experiment_of_before_gets_the_kind_too(tracked: Path) -> None:
    known = tracking.client().create_experiment("older")
    assert tracking.open_experiment("older") == known
    assert tracking.client().get_experiment(known).tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_result_of_another_release_is_made_again(parent: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = _publish(parent, "rows of an old evaluation")
    with tracking.stage_run(parent, "old") as run_id:
        tracking.remember(run_id, kept)  # without the fields of today
    assert tracking.recall(parent, "old", EvalReport) is None
    assert "Stage old runs again: its result was written by another release" in caplog.text
