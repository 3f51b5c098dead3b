"""Faults that take minutes of waiting until somebody notices: workers gone, processes frozen, everything stopped."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.service import processes
from flows.service.servers import GPU_WORKER, MLFLOW, PREFECT
from tasks import tracking
from tests.end_to_end.service import Service, small_config, wait_until
from tests.end_to_end.trainings import SECONDS, Trainings, prepared_trainings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("SFT_SERVICE_TESTS") != "all", reason="waits long: set SFT_SERVICE_TESTS=all"),
]
AWAY_SECONDS = float(os.environ.get("SFT_AWAY_SECONDS", "10"))
_ENDLESS = 100_000  # steps
_PIPELINE = "sft-pipeline/sft-pipeline"
_SILENCE = "Runs that fell silent are marked Crashed"


@pytest.fixture(scope="module")
def trainings(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    with prepared_trainings(service, tmp_path_factory.mktemp("rows")) as prepared:
        yield prepared


@contextmanager
def short_silence(service: Service) -> Iterator[None]:
    """Let a run count as silent after 45 s in place of three minutes; not where the whole time is asked for."""
    if AWAY_SECONDS >= 60:
        yield
        return
    (found,) = service.prefect("POST", "/automations/filter", {"automations": {"name": {"any_": [_SILENCE]}}})
    kept = {name: found[name] for name in ("name", "description", "enabled", "trigger", "actions")}
    short = {**kept, "trigger": {**kept["trigger"], "within": 45}}
    service.prefect("PUT", f"/automations/{found['id']}", short)
    yield
    service.prefect("PUT", f"/automations/{found['id']}", kept)


def _kill_worker(service: Service) -> None:
    worker = processes.find(service.folder, GPU_WORKER)
    assert worker is not None
    worker.send_signal(signal.SIGKILL)
    worker.wait(30)


def _is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _check_it_goes_on(trainings: Trainings, parent: str) -> None:
    """Start a parent run's training again: it goes on from its last checkpoint, and leaves the GPU free."""
    assert trainings.slots_taken() == 0
    (*_, reached), since = trainings.checkpoints(parent), time.time()
    again = trainings.start(parent, _ENDLESS)
    assert trainings.first_step_since(parent, since) == reached + 1
    trainings.service.cancel(again)
    trainings.service.wait(again, {"Cancelled"}, seconds=SECONDS)
    assert trainings.slots_taken() == 0


def test_a_worker_that_dies_does_not_take_the_training_with_it(service: Service, trainings: Trainings) -> None:
    parent = trainings.open()
    run = trainings.start(parent, 100)
    trainings.wait_for_checkpoint(run, parent)
    _kill_worker(service)
    service.wait(run, {"Completed"}, seconds=SECONDS)
    assert trainings.is_whole(parent, 100)
    assert trainings.slots_taken() == 0
    service.bring_back(GPU_WORKER)


def test_a_run_that_is_cancelled_without_a_worker_ends_by_itself(service: Service, trainings: Trainings) -> None:
    parent = trainings.open()
    run = trainings.start(parent, _ENDLESS)
    training = trainings.wait_for_checkpoint(run, parent)
    _kill_worker(service)
    service.cancel(run)
    service.wait(run, {"Cancelled"}, seconds=SECONDS)
    wait_until(lambda: _is_gone(training), seconds=SECONDS)
    assert trainings.slots_taken() == 0
    assert "ended by itself" in service.run(run)["state"]["message"]
    service.bring_back(GPU_WORKER)


def test_worker_and_run_that_die_together_free_the_gpu(service: Service, trainings: Trainings) -> None:
    with short_silence(service):
        parent = trainings.open()
        run = trainings.start(parent, _ENDLESS)
        training = trainings.wait_for_checkpoint(run, parent)
        time.sleep(2)  # its first heartbeat is on its way to the server
        _kill_worker(service)
        training.send_signal(signal.SIGKILL)
        assert service.run(run)["state"]["name"] == "Running"  # nobody is left to say otherwise
        state = service.wait(run, {"Crashed"}, seconds=SECONDS)["state"]
        assert "No heartbeat" in state["message"]
        service.bring_back(GPU_WORKER)
        _check_it_goes_on(trainings, parent)


def test_a_frozen_run_frees_the_gpu_and_ends_when_it_wakes(service: Service, trainings: Trainings) -> None:
    with short_silence(service):
        parent = trainings.open()
        run = trainings.start(parent, _ENDLESS)
        training = trainings.wait_for_checkpoint(run, parent)
        time.sleep(2)
        training.send_signal(signal.SIGSTOP)
        try:
            service.wait(run, {"Crashed"}, seconds=SECONDS)
            assert trainings.slots_taken() == 0
        finally:
            training.send_signal(signal.SIGCONT)
        wait_until(lambda: _is_gone(training), seconds=SECONDS)
        assert service.run(run)["state"]["name"] == "Crashed"
        _check_it_goes_on(trainings, parent)


def test_a_worker_that_is_told_to_end_takes_the_training_along(service: Service, trainings: Trainings) -> None:
    parent = trainings.open()
    run = trainings.start(parent, _ENDLESS)
    training = trainings.wait_for_checkpoint(run, parent)
    processes.stop(service.folder, GPU_WORKER)
    assert _is_gone(training)
    service.wait(run, {"Crashed"}, seconds=SECONDS)
    service.bring_back(GPU_WORKER)
    _check_it_goes_on(trainings, parent)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    found = small_config(tmp_path)
    return {**found, "name": tmp_path.name, "training": {**found["training"], "max_steps": 200, "num_epochs": 1000}}


def _children(service: Service, pipeline: str, name: str, state: str) -> list[dict[str, Any]]:
    query = {"flow_runs": {"parent_flow_run_id": {"any_": [pipeline]}}, "flows": {"name": {"any_": [name]}}}
    return [run for run in service.prefect("POST", "/flow_runs/filter", query) if run["state"]["name"] == state]


def test_servers_gone_between_two_stages_cost_the_pipeline_nothing(
    service: Service, trainings: Trainings, tmp_path: Path
) -> None:
    pipeline = service.start(_PIPELINE, {"config": {**small_config(tmp_path), "name": tmp_path.name}})
    wait_until(lambda: bool(_children(service, pipeline, "evaluate", "Completed")), seconds=SECONDS)
    for name in (PREFECT, MLFLOW):
        processes.stop(service.folder, name)
    time.sleep(AWAY_SECONDS)
    service.bring_back(MLFLOW, PREFECT)
    service.wait(pipeline, {"Completed"}, seconds=2 * SECONDS)
    assert trainings.slots_taken() == 0


def test_a_pipeline_stopped_with_the_service_goes_on_with_a_retry(
    service: Service, trainings: Trainings, config: dict[str, Any]
) -> None:
    pipeline = service.start(_PIPELINE, {"config": config})
    wait_until(lambda: bool(_children(service, pipeline, "train", "Running")), seconds=SECONDS)
    (parent,) = tracking.client().search_runs(
        [tracking.open_experiment(config["name"])], "tags.`sft.config_digest` LIKE '%'"
    )
    wait_until(lambda: bool(trainings.checkpoints(parent.info.run_id)), seconds=SECONDS)
    service.sft("stop")
    assert processes.marked(service.folder) == []
    (*_, reached), since = trainings.checkpoints(parent.info.run_id), time.time()
    service.sft("serve")
    assert service.run(pipeline)["state"]["type"] in ("CRASHED", "CANCELLED")
    assert trainings.slots_taken() == 0
    # As the page's Retry button does.
    retry = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    service.prefect("POST", f"/flow_runs/{pipeline}/set_state", retry)
    wait_until(lambda: service.run(pipeline)["state"]["name"] == "Completed", seconds=2 * SECONDS)
    assert trainings.first_step_since(parent.info.run_id, since) == reached + 1
