"""How an attempt of a run ends, and what `sft runs` says of it then."""

from contextlib import suppress
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from flows.attempts import open_attempt
from flows.gpu_stages import StageFailedError, StageLostError, note_loss, read_losses
from schemas.loading import parse_config
from tasks.registry.listing import list_runs
from tasks.training.records import TrainingCrash


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


def attempt(error: BaseException | None, resume: str) -> tuple[str, str, str]:
    """Make an attempt that ends so; return the run's id, status and reason as they are listed then."""
    config = parse_config({"model": {"base_model": "base"}, "data": {"source": "rows.jsonl"}})
    ends = [] if error is None else [type(error)]
    with suppress(*ends), disable_run_logger(), open_attempt(config, resume=resume, run_name="attempted"):
        (row,) = list_runs(limit=10)
        assert (row.status, row.failure) == ("RUNNING", "")  # the reason of the attempt before is over
        if error is not None:
            raise error
    (row,) = list_runs(limit=10)
    return row.run, row.status, row.failure


def test_every_end_that_is_an_error_has_its_reason() -> None:
    crash = "TrainingCrash: process 2 of 2 was killed by SIGKILL"
    run, *told = attempt(TrainingCrash("process 2 of 2 was killed by SIGKILL:\nits log"), "never")
    assert told == ["KILLED", crash]
    assert attempt(StageLostError("train was lost 3 times"), run) == (
        run,
        "KILLED",
        "StageLostError: train was lost 3 times",
    )
    assert attempt(KeyboardInterrupt(), run[:8]) == (run, "KILLED", "")  # somebody wanted it
    assert attempt(StageFailedError("no such folder"), run) == (run, "FAILED", "StageFailedError: no such folder")
    assert attempt(None, run) == (run, "FINISHED", "")


def test_a_stage_that_was_lost_on_the_pool_is_known_to_later_attempts() -> None:
    run, *_ = attempt(None, "never")
    assert read_losses(run) == ()
    note_loss(run, "train on the GPU pool was lost at start 1 of 3: no heartbeat")
    note_loss(run, "evaluate was lost" + "!" * 9000)
    first, second = read_losses(run)
    assert first == "train on the GPU pool was lost at start 1 of 3: no heartbeat"
    assert (second[:18], len(second)) == ("evaluate was lost!", 500)
