"""prefect.yaml and automations.yaml say what Prefect understands: it passes over unknown keys in silence."""

import asyncio
import copy
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import (
    ConcurrencyLimitSpec,
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.client.orchestration import PrefectClient
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import ValidationError, validate
from prefect.workers.process import ProcessJobConfiguration
from pydantic import BaseModel

from flows.service.deployments import (
    AUTOMATIONS_FILE,
    PREFECT_FILE,
    read_automations,
    read_deployments,
    read_job_template,
)
from schemas.loading import load_config
from tests.end_to_end.conftest import ROOT


def _unknown(values: dict[str, Any], model: type[BaseModel], where: str) -> Iterator[str]:
    known = {*model.model_fields, *(field.alias for field in model.model_fields.values())}
    yield from (f"{where}.{key}" for key in values if key not in known)


def _lint(text: dict[str, Any]) -> list[str]:
    """Return the keys of a prefect.yaml that no model of Prefect's knows."""
    found = list(_unknown({key: text[key] for key in text if key != "definitions"}, PrefectYamlModel, "file"))
    for deployment in text["deployments"]:
        where = deployment["name"]
        found += _unknown(deployment, DeploymentConfig, where)
        found += _unknown(deployment["work_pool"], WorkPoolConfig, f"{where}.work_pool")
        found += _unknown(deployment.get("concurrency_limit", {}), ConcurrencyLimitSpec, f"{where}.concurrency_limit")
        for schedule in deployment.get("schedules", []):
            found += _unknown(schedule, RawScheduleConfig, f"{where}.schedules")
        for trigger in deployment.get("triggers", []):
            found += _unknown(trigger, DeploymentEventTrigger, f"{where}.triggers")
    return found


@pytest.fixture
def text() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))
    return copy.deepcopy(values)  # anchors make one object of several


def test_no_key_is_unknown(text: dict[str, Any]) -> None:
    assert _lint(text) == []


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ((), "concurency_limit"),
        ((), "paramters"),
        (("work_pool",), "queue"),
        (("concurrency_limit",), "grace_period"),
    ],
)
def test_a_slip_is_found(text: dict[str, Any], path: tuple[str, ...], key: str) -> None:
    target = next(each for each in text["deployments"] if each["name"] == "train")
    for part in path:
        target = target[part]
    target[key] = 1
    assert [slip.rpartition(".")[2] for slip in _lint(text)][:1] == [key]


def test_every_deployment_is_a_flow_that_takes_its_parameters() -> None:
    for deployment in read_deployments():
        flow: Flow[..., Any] = load_flow_from_entrypoint(deployment["entrypoint"])
        names = set(parameter_schema(flow).properties)
        triggered = [name for trigger in deployment.get("triggers", []) for name in trigger["parameters"]]
        assert names >= {*deployment.get("parameters", {}), *triggered}, deployment["name"]


def test_the_form_begins_with_the_demo() -> None:
    shown = next(each for each in read_deployments() if each["name"] == "sft-pipeline")["parameters"]["config"]
    demo = load_config(ROOT / "deploy" / "configs" / "demo.yaml").model_dump(mode="json", exclude_unset=True)
    assert shown == demo


def test_the_nightly_run_waits_to_be_switched_on() -> None:
    deployment = next(each for each in read_deployments() if each["name"] == "sft-pipeline")
    assert [schedule["active"] for schedule in deployment["schedules"]] == [False]


def test_the_gpu_takes_one_run_at_a_time() -> None:
    limits = {d["name"]: d["concurrency_limit"] for d in read_deployments() if d["work_pool"]["name"] == "gpu"}
    wanted = {"limit": 1, "collision_strategy": "ENQUEUE", "grace_period_seconds": 600}
    assert limits == {"train": wanted, "evaluate": wanted}


def _configure(template: dict[str, Any], variables: dict[str, Any]) -> ProcessJobConfiguration:
    # No server is asked: nothing in the template refers to one's blocks or variables.
    client = PrefectClient("http://127.0.0.1:9/api")
    return asyncio.run(ProcessJobConfiguration.from_template_and_values(template, variables, client=client))


@pytest.mark.parametrize("pool", ["cpu", "gpu"])
def test_a_run_cannot_say_how_it_is_started(pool: str) -> None:
    template = read_job_template(pool)
    fixed = _configure(template, {})
    assert list(_unknown(template["job_configuration"], ProcessJobConfiguration, pool)) == []
    wanted = {"command": "touch /tmp/here", "working_dir": "/tmp", "stream_output": True, "env": {"PYTHONPATH": "/tmp"}}
    wanted |= {"env.LD_PRELOAD": "/tmp/here.so"}
    assert _configure(template, wanted) == fixed
    assert fixed.env == {}
    assert fixed.command is not None
    assert fixed.command.endswith(f" {shlex.quote(sys.executable)} -m prefect.engine")
    assert fixed.working_dir == ROOT
    assert fixed.stream_output is False  # a run that prints into a pipe of its worker dies with it
    with pytest.raises(ValidationError, match="env"):
        validate({"env": {"PYTHONPATH": "/tmp"}}, template["variables"], raise_on_error=True)


def test_deployments_set_no_job_variables_either() -> None:
    assert not [each["name"] for each in read_deployments() if "job_variables" in each["work_pool"]]


def test_silent_runs_are_marked_crashed_after_six_missed_heartbeats() -> None:
    for raw in yaml.safe_load(AUTOMATIONS_FILE.read_text(encoding="utf-8")):
        assert list(_unknown(raw, AutomationCore, "automation")) == []
        assert list(_unknown(raw["trigger"], EventTrigger, "trigger")) == []
        assert list(_unknown(raw["actions"][0], ChangeFlowRunState, "action")) == []
    (zombies,) = read_automations()
    assert isinstance(zombies.trigger, EventTrigger)
    for pool in ("cpu", "gpu"):
        assert " PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 " in read_job_template(pool)["job_configuration"]["command"]
    assert zombies.trigger.within.total_seconds() == 180
