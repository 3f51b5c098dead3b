"""The servers as a team starts them: twice without harm, and nobody in without the log-in."""

import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.service import processes
from flows.service.servers import STOP_ORDER
from tests.end_to_end.service import Service, small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SFT_SERVICE_TESTS" not in os.environ, reason="takes minutes: set SFT_SERVICE_TESTS=1"),
]
_PIPELINE = "sft-pipeline/sft-pipeline"


def test_started_again_it_does_no_harm(service: Service) -> None:
    before = {name: processes.find(service.folder, name) for name in STOP_ORDER}
    service.sft("serve")
    assert {name: processes.find(service.folder, name) for name in STOP_ORDER} == before
    assert None not in before.values()


def test_both_servers_ask_for_the_log_in(service: Service) -> None:
    client = service.client
    prefect, mlflow = f"{client['PREFECT_API_URL']}/flows/count", f"{client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow"
    for login in (None, ("admin", "wrong")):
        assert httpx.post(prefect, json={}, auth=login).status_code == 401
        assert httpx.get(f"{mlflow}/experiments/get?experiment_id=0", auth=login).status_code == 401
    for file in ("credentials.env", "client.env", "mlflow-auth.ini"):
        assert (service.folder / file).stat().st_mode & 0o777 == 0o600


def test_a_wrong_setting_is_refused_before_anything_starts(service: Service, tmp_path: Path) -> None:
    small = small_config(tmp_path)
    wrong = {**small, "training": {**small["training"], "rnak": 8}}
    with pytest.raises(httpx.HTTPStatusError) as caught:
        service.start(_PIPELINE, {"config": wrong})
    assert caught.value.response.status_code == 409
    assert "rnak" in caught.value.response.text


def test_pipeline_runs_wait_in_a_line_of_their_own(service: Service) -> None:
    limits = {queue["name"]: queue["concurrency_limit"] for queue in _queues(service)}
    assert limits == {"default": None, "runs": min(4, os.cpu_count() or 1)}
    line = {name: service.deployment(f"{name}/{name}")["work_queue_name"] for name in ("sft-pipeline", "rollback")}
    assert line == {"sft-pipeline": "runs", "rollback": "default"}


def _queues(service: Service) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.prefect("POST", "/work_pools/cpu/queues/filter", {})
    return found


def test_what_the_service_writes_is_its_owners_alone(service: Service) -> None:
    pages = service.home / "prefect" / "ui"  # copied with the modes that they are installed with
    written = [path for path in service.home.rglob("*") if not path.is_symlink() and not path.is_relative_to(pages)]
    assert [path for path in (service.home, *written) if path.stat().st_mode & 0o077] == []
    assert {"mlflow-server.log", "mlflow.db" if _is_sqlite(service) else "credentials.env"} <= {
        path.name for path in service.home.rglob("*")
    }


def _is_sqlite(service: Service) -> bool:
    return "SFT_DATABASE_URL" not in service.environment


def test_a_form_reads_no_file_outside_the_roots(service: Service, tmp_path: Path) -> None:
    small = small_config(tmp_path)
    run = service.start(_PIPELINE, {"config": {**small, "data": {"source": "/etc/passwd"}}})
    message = service.wait(run, {"Failed"}, seconds=300)["state"]["message"]
    assert "OutsideRootsError" in message
    assert "/etc/passwd is not below" in message


def test_an_experiment_keeps_its_artifacts_where_the_server_says(service: Service, tmp_path: Path) -> None:
    url = f"{service.client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/create"
    login = (service.client["MLFLOW_TRACKING_USERNAME"], service.client["MLFLOW_TRACKING_PASSWORD"])
    wanted = {"name": "elsewhere", "artifact_location": str(tmp_path)}
    answer = httpx.post(url, json=wanted, auth=login)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert httpx.post(url, json={"name": "elsewhere"}, auth=login).status_code == 200
