"""Processes are really killed, servers really gone, disks really full; a training loses nothing and holds no GPU.

Most runs here are those of the deployment `train`, with data that is prepared once. SFT_AWAY_SECONDS sets how long
servers are away. SFT_SERVICE_TESTS=1 brings in the first test, `faults` all of them, `all` those of
test_service_long_faults.py too, which take minutes until somebody notices.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.service import processes
from flows.service.servers import MLFLOW, PREFECT
from tasks import storage, tracking
from tests.end_to_end.service import Service, small_config, wait_until
from tests.end_to_end.trainings import SECONDS, Trainings, prepared_trainings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SFT_SERVICE_TESTS" not in os.environ, reason="takes minutes: set SFT_SERVICE_TESTS=1"),
]
_minutes = pytest.mark.skipif(
    os.environ.get("SFT_SERVICE_TESTS") not in ("faults", "all"),
    reason="takes minutes more: set SFT_SERVICE_TESTS=faults",
)
_AWAY_SECONDS = float(os.environ.get("SFT_AWAY_SECONDS", "10"))
_ENDLESS = 100_000  # steps: a training that does not end before what is done to it
_LONG = 400  # as long as that, and still to be trained to its end afterwards: ten seconds and more
_PIPELINE = "sft-pipeline/sft-pipeline"


@pytest.fixture(scope="module")
def trainings(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    with prepared_trainings(service, tmp_path_factory.mktemp("rows")) as prepared:
        yield prepared


def _gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _children(service: Service, pipeline: str, flow: str) -> list[dict[str, Any]]:
    query = {"flow_runs": {"parent_flow_run_id": {"any_": [pipeline]}}, "flows": {"name": {"any_": [flow]}}}
    found: list[dict[str, Any]] = service.prefect("POST", "/flow_runs/filter", query)
    return found


def _child(service: Service, pipeline: str, *states: str) -> str | None:
    """Return a training that a pipeline run has started and that is in one of these states."""
    found = _children(service, pipeline, "train")
    return next((str(run["id"]) for run in found if run["state"]["name"] in states), None)


def _wait_for_child(service: Service, pipeline: str, *states: str) -> str:
    wait_until(lambda: _child(service, pipeline, *states) is not None, seconds=SECONDS)
    return str(_child(service, pipeline, *states))


def test_a_cancelled_run_frees_the_gpu_and_goes_on_later(service: Service, trainings: Trainings) -> None:
    first_parent, second_parent = trainings.open(), trainings.open()
    first = trainings.start(first_parent, _ENDLESS)
    training = trainings.wait_for_checkpoint(first, first_parent)
    second = trainings.start(second_parent, 20)
    service.wait(second, {"AwaitingConcurrencySlot", "Late", "Scheduled", "Pending"}, seconds=SECONDS)
    assert service.run(first)["state"]["name"] == "Running"
    assert trainings.slots_taken() == 1
    service.cancel(first)
    service.wait(first, {"Cancelled"}, seconds=SECONDS)
    assert _gone(training)
    service.wait(second, {"Completed"}, seconds=SECONDS)  # one GPU: it had to wait for its turn
    assert trainings.is_whole(second_parent, 20)
    (*_, reached), since = trainings.checkpoints(first_parent), time.time()
    again = trainings.start(first_parent, _ENDLESS)
    assert trainings.first_step_since(first_parent, since) == reached + 1
    service.cancel(again)
    service.wait(again, {"Cancelled"}, seconds=SECONDS)
    assert trainings.slots_taken() == 0


@_minutes
def test_servers_that_are_gone_for_a_while_cost_no_step(service: Service, trainings: Trainings) -> None:
    parent = trainings.open()
    run = trainings.start(parent, 200)
    trainings.wait_for_checkpoint(run, parent)
    for name in (MLFLOW, PREFECT):
        processes.stop(service.folder, name)
    time.sleep(_AWAY_SECONDS)
    service.bring_back(MLFLOW, PREFECT)
    # The server knows again who holds the GPU: a lease that it had forgotten would end the run.
    if service.run(run)["state"]["name"] == "Running":
        lease = service.run(run)["state"]["state_details"]["deployment_concurrency_lease_id"]
        service.prefect("POST", f"/v2/concurrency_limits/leases/{lease}/renew", {"lease_duration": 300})
    service.wait(run, {"Completed"}, seconds=SECONDS)
    assert trainings.is_whole(parent, 200)
    assert trainings.slots_taken() == 0


@_minutes
def test_a_full_disk_fails_the_training_and_a_retry_goes_on_from_the_last_checkpoint(
    service: Service, trainings: Trainings
) -> None:
    parent = trainings.open()
    folder = storage.run_folder(parent) / "train" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        run = trainings.start(parent, 60, keep_checkpoints=100)
        message = service.wait(run, {"Failed"}, seconds=SECONDS)["state"]["message"]
        assert "No space left on device" in message
        assert "make room and start again" in message
        assert trainings.slots_taken() == 0
        before = trainings.checkpoints(parent)
        assert before
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        since = time.time()
        again = trainings.start(parent, 60, keep_checkpoints=100)
        service.wait(again, {"Completed"}, seconds=SECONDS)
        assert trainings.first_step_since(parent, since) == before[-1] + 1
        assert trainings.is_whole(parent, 60)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def pipeline_config(tmp_path: Path) -> dict[str, Any]:
    config = small_config(tmp_path)
    return {**config, "name": tmp_path.name, "training": {**config["training"], "max_steps": _LONG, "num_epochs": 1000}}


@_minutes
def test_a_pipeline_starts_a_killed_stage_again_takes_it_along_when_cancelled_and_goes_on_later(
    service: Service, trainings: Trainings, pipeline_config: dict[str, Any]
) -> None:
    pipeline = service.start(_PIPELINE, {"config": pipeline_config})
    killed = _wait_for_child(service, pipeline, "Running")
    (parent,) = _wait_for_runs(pipeline_config["name"])
    trainings.wait_for_checkpoint(killed, parent).send_signal(signal.SIGKILL)
    service.wait(killed, {"Crashed"}, seconds=SECONDS)
    reached = trainings.checkpoints(parent)[-1]
    child = _wait_for_child(service, pipeline, "Running")
    wait_until(lambda: trainings.checkpoints(parent)[-1] > reached, seconds=SECONDS)
    training = service.process_of(child)
    service.cancel(pipeline)
    service.wait(pipeline, {"Cancelled"}, seconds=SECONDS)
    service.wait(child, {"Cancelled"}, seconds=SECONDS)
    assert _gone(training)
    assert trainings.slots_taken() == 0
    (*_, reached), since = trainings.checkpoints(parent), time.time()
    again = service.start(_PIPELINE, {"config": pipeline_config})
    service.wait(again, {"Completed"}, seconds=2 * SECONDS)
    assert trainings.first_step_since(parent, since) == reached + 1
    # What the first run knows of the base model is cached, and waits for no turn on the GPU.
    assert [run["parameters"]["model"]["kind"] for run in _children(service, pipeline, "evaluate")] == ["base"]
    assert [run["parameters"]["model"]["kind"] for run in _children(service, again, "evaluate")] == ["merged"]
    assert _wait_for_runs(pipeline_config["name"]) == [parent]  # all of it is one run in MLflow
    assert tracking.get_run(parent).info.status == "FINISHED"
    report = json.loads(Path(tracking.client().download_artifacts(parent, "run_report.json")).read_text("utf-8"))
    (lost,) = [warning for warning in report["evaluation"]["warnings"] if "on the GPU pool" in warning]
    assert f"train on the GPU pool (flow run {service.run(killed)['name']}) was lost at start 1 of 3" in lost
    version = tracking.client().get_model_version(report["registry"]["name"], report["registry"]["version"])
    assert lost in (version.description or "")


def _wait_for_runs(experiment: str) -> list[str]:
    """Return the MLflow runs of pipeline runs in an experiment."""
    found = tracking.client().get_experiment_by_name(experiment)
    assert found is not None
    runs = tracking.client().search_runs([found.experiment_id], f"tags.`{tracking.CONFIG_TAG}` LIKE '%'")
    return [run.info.run_id for run in runs]
