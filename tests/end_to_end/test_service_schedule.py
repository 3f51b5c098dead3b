"""What runs without anybody: the schedule fires and its run ends well; runs that wait or fall silent are marked."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows.service import processes
from flows.service.servers import CPU_WORKER
from tasks import tracking
from tests.end_to_end.service import Service, small_config, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SFT_SERVICE_TESTS" not in os.environ, reason="takes minutes: set SFT_SERVICE_TESTS=1"),
]
_PIPELINE, _NAME = "sft-pipeline/sft-pipeline", "nightly-model"
_SILENCE = "Runs that fell silent are marked Crashed"
_RUN_SECONDS = 1200  # a run takes one minute or two on a quiet machine
_SILENT_SECONDS = 40  # more than a heartbeat apart (30 s), less than the three minutes of automations.yaml


@pytest.fixture(scope="module")
def config(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Settings of a run that takes seconds and registers a model of its own; this process's MLflow is the service's."""
    small = small_config(tmp_path_factory.mktemp("rows"))
    rows = Path(small["data"]["source"])  # of its own: a stage that is cached for another test has no run there
    rows.write_text(rows.read_text().replace("Say", "Name"))
    small |= {"name": "nightly", "training": {**small["training"], "num_epochs": 1}}
    small["registry"] = {"name": _NAME, "gate": {"metric": "nll"}}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**service.client, "SFT_HOME": str(service.home)}.items():
            patch.setenv(name, value)
        yield small


@contextmanager
def _every_minute(service: Service, config: dict[str, Any]) -> Iterator[None]:
    """Switch the nightly schedule on, every minute, with these settings; as it was afterwards."""
    deployment = service.deployment(_PIPELINE)
    (schedule,) = deployment["schedules"]
    assert schedule["active"] is False
    path = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
    minutely = {**schedule["schedule"], "cron": "* * * * *"}
    service.prefect("PATCH", path, {"active": True, "schedule": minutely, "parameters": {"config": config}})
    try:
        yield
    finally:
        service.prefect("PATCH", path, {"active": False, "schedule": schedule["schedule"], "parameters": {}})


def _scheduled_runs(service: Service, *states: str) -> list[dict[str, Any]]:
    query = {"flows": {"name": {"any_": ["sft-pipeline"]}}, "flow_runs": {"state": {"name": {"any_": list(states)}}}}
    found: list[dict[str, Any]] = service.prefect("POST", "/flow_runs/filter", query)
    return [run for run in found if run["auto_scheduled"]]


def test_a_scheduled_run_ends_with_a_registered_version(service: Service, config: dict[str, Any]) -> None:
    with _every_minute(service, config):
        wait_until(lambda: bool(_scheduled_runs(service, "Running")), seconds=300)
    (run, *_) = _scheduled_runs(service, "Running")
    service.wait(run["id"], {"Completed"}, seconds=_RUN_SECONDS)
    (version,) = tracking.client().search_model_versions(f"name = '{_NAME}'")
    assert version.tags["sft.prefect_flow_run"] == run["id"]
    assert _scheduled_runs(service, "Scheduled", "Late", "Pending", "Running") == []  # switched off, it plans no more


def test_a_run_that_nobody_takes_is_late_and_runs_when_somebody_does(service: Service) -> None:
    queue = service.prefect("POST", "/work_pools/cpu/queues", {"name": "paused", "is_paused": True})
    deployment = service.deployment("rollback/rollback")
    wanted = {"flow_id": deployment["flow_id"], "deployment_id": deployment["id"], "parameters": {"name": "none"}}
    wanted |= {"work_pool_name": "cpu", "work_queue_name": "paused", "state": {"type": "SCHEDULED"}}
    run = service.prefect("POST", "/flow_runs/", wanted)["id"]
    service.wait(run, {"Late"}, seconds=120)
    service.prefect("PATCH", f"/work_pools/cpu/queues/{queue['name']}", {"is_paused": False})
    service.wait(run, {"Failed"}, seconds=300)  # there is no such model
    service.prefect("DELETE", f"/work_pools/cpu/queues/{queue['name']}")


@pytest.fixture
def _impatient(service: Service) -> Iterator[None]:
    """Let a run count as silent sooner than after three minutes."""
    (found,) = service.prefect("POST", "/automations/filter", {"automations": {"name": {"any_": [_SILENCE]}}})
    kept = {name: found[name] for name in ("name", "description", "enabled", "trigger", "actions")}
    sooner = {**kept, "trigger": {**kept["trigger"], "within": _SILENT_SECONDS}}
    service.prefect("PUT", f"/automations/{found['id']}", sooner)
    yield
    service.prefect("PUT", f"/automations/{found['id']}", kept)


@pytest.mark.usefixtures("_impatient")
def test_a_run_that_dies_together_with_its_worker_is_marked_crashed(service: Service, config: dict[str, Any]) -> None:
    run = service.start(_PIPELINE, {"config": {**config, "name": "silent"}})
    service.wait(run, {"Running"}, seconds=300)
    wait_until(lambda: _heartbeats(service, run) > 0, seconds=120)
    worker = processes.find(service.folder, CPU_WORKER)
    assert worker is not None
    for process in (worker, service.process_of(run)):
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    try:
        assert service.run(run)["state"]["name"] == "Running"  # nobody is left to say otherwise
        assert "No heartbeat" in service.wait(run, {"Crashed"}, seconds=300)["state"]["message"]
    finally:
        service.bring_back(CPU_WORKER)


def _heartbeats(service: Service, run: str) -> int:
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run}"]}}
    return int(service.prefect("POST", "/events/filter", {"filter": wanted})["total"])
