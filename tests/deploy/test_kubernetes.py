"""The GPU pool's job on Kubernetes, rendered by Prefect's own worker and validated against the API's schema."""

import asyncio
import json
import shlex
import uuid
from typing import Any

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun

from flows.service.deployments import read_job_template
from tests.end_to_end.service import ROOT

worker = pytest.importorskip("prefect_kubernetes.worker", reason="the kubernetes extra is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the kubernetes extra is not installed")


def _read_template() -> dict[str, Any]:
    template: dict[str, Any] = json.loads((ROOT / "deploy" / "kubernetes" / "gpu-pool.json").read_text())
    return template


def _render(variables: dict[str, Any]) -> dict[str, Any]:
    template = _read_template()
    # No server is asked: nothing in the template refers to one's blocks or variables.
    client = PrefectClient("http://127.0.0.1:9/api")
    configuration = asyncio.run(
        worker.KubernetesWorkerJobConfiguration.from_template_and_values(template, variables, client=client)
    )
    configuration.prepare_for_flow_run(FlowRun(id=uuid.UUID(int=1), flow_id=uuid.UUID(int=2), name="train demo"))
    manifest: dict[str, Any] = configuration.job_manifest
    return manifest


def test_the_job_is_valid_and_asks_for_a_gpu_its_node_and_shared_memory() -> None:
    job = _render({})
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
    assert {"name": "PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "value": "30"} in container["env"]
    assert container["args"] == ["python", "-m", "prefect.engine"]


def test_a_run_can_ask_for_more_gpus_of_a_kind() -> None:
    job = _render({"gpus": 4, "node_selector": {"gpu": "h200"}, "memory": "256Gi", "shm_size": "64Gi"})
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"gpu": "h200"}
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "256Gi", "nvidia.com/gpu": 4}


def test_a_run_cannot_bring_a_command_an_image_or_a_volume_of_its_own() -> None:
    wanted = {"command": "touch /tmp/here", "image": "mine", "env": {"PYTHONPATH": "/tmp"}, "work_claim": "mine"}
    assert _render(wanted)["spec"] == _render({})["spec"]
    schema = _read_template()["variables"]
    assert sorted(schema["properties"]) == ["cpu", "gpus", "memory", "node_selector", "shm_size"]
    assert schema["additionalProperties"] is False  # so the server refuses the others


def test_it_starts_runs_as_the_pool_of_processes_does() -> None:
    (container,) = _read_template()["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"]
    here = shlex.split(read_job_template("gpu")["job_configuration"]["command"])
    assert [f"{each['name']}={each['value']}" for each in container["env"]] == here[1:4]
    assert container["args"][1:] == here[5:] == ["-m", "prefect.engine"]


def test_a_slip_in_the_template_is_found() -> None:
    job = _render({})
    job["spec"]["template"]["spec"]["tolerationz"] = []
    with pytest.raises(Exception, match="tolerationz"):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
