"""Work pools, deployments and automations on the Prefect server that the settings in force name."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

from flows.service.settings import ServiceError

ROOT = Path(__file__).resolve().parents[2]
PREFECT_FILE = ROOT / "deploy" / "prefect.yaml"
POOLS_FILE = ROOT / "deploy" / "pools.yaml"
AUTOMATIONS_FILE = ROOT / "deploy" / "automations.yaml"
# Pipeline runs wait most of their time for the GPU, and each holds about 0.8 GB meanwhile: the next ones wait in line.
# On few cores more at once would only take each other's time: one a core, then.
# Promotions and rollbacks are in the pool's default queue and start at once.
_QUEUE, _RUNS_AT_ONCE = ("cpu", "runs"), min(4, os.cpu_count() or 1)
_PROCESS = "process"  # Prefect's type of pools whose runs are processes of the worker's machine
_DEPLOY_SECONDS = 300
_LOG_TAIL_LINES = 15


def deploy_all(environment: dict[str, str] | None = None, *, pool_type: str = _PROCESS) -> None:
    """Create missing pools and queues, all deployments of prefect.yaml, and the automations; again and again alike.

    Args:
        environment: of Prefect's own command; this process's when left out.
        pool_type: of pools that are missing; a pool that is there keeps its type, and one of another type than process
            its template.

    Raises:
        ServiceError: Prefect refused a deployment; with what it said.
    """
    with get_client(sync_client=True) as client:
        for pool in sorted({deployment["work_pool"]["name"] for deployment in read_deployments()}):
            _put_pool(client, pool, pool_type)
        _create_queue(client, *_QUEUE, limit=_RUNS_AT_ONCE)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    done = subprocess.run(
        command,
        env={**(environment or os.environ)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=_DEPLOY_SECONDS,
    )
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()
        raise ServiceError(f"{PREFECT_FILE} could not be deployed:\n" + "\n".join(lines[-_LOG_TAIL_LINES:]))
    with get_client(sync_client=True) as client:
        for automation in read_automations():
            _put_automation(client, automation)


def read_deployments() -> list[dict[str, Any]]:
    """Return the deployments as prefect.yaml has them."""
    found: list[dict[str, Any]] = yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))["deployments"]
    return found


def read_automations() -> list[AutomationCore]:
    """Return the automations as automations.yaml has them."""
    return [AutomationCore.model_validate(each) for each in yaml.safe_load(AUTOMATIONS_FILE.read_text("utf-8"))]


def worker_is_online(pool: str) -> bool:
    """Tell whether a worker of this pool reports to the server."""
    online = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
    with get_client(sync_client=True) as client:
        return bool(client.read_workers_for_work_pool(pool, worker_filter=online))


def read_job_template(pool: str) -> dict[str, Any]:
    """Return what a process pool starts runs with: values from pools.yaml, and no variable that a run could set.

    The environment is part of the command: Prefect mixes a run's own `env` into one that a template has, and checks
    job variables against the schema on some of its ways only.
    """
    values: dict[str, Any] = yaml.safe_load(POOLS_FILE.read_text(encoding="utf-8"))[pool]
    variables = [f"{name}={value}" for name, value in values.pop("env").items()]
    places = {"python": shlex.quote(sys.executable), "root": str(ROOT)}
    fixed = {name: value.format(**places) if isinstance(value, str) else value for name, value in values.items()}
    fixed["command"] = f"{shlex.join(['env', *variables])} {fixed['command']}"
    return {
        "job_configuration": fixed,
        "variables": {"type": "object", "properties": {}, "additionalProperties": False},
    }


def _put_pool(client: SyncPrefectClient, name: str, pool_type: str) -> None:
    """Create a pool when it is missing; one of processes gets our way of starting runs, whatever it had."""
    template = read_job_template(name)
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        given = {"base_job_template": template} if pool_type == _PROCESS else {}
        client.create_work_pool(WorkPoolCreate(name=name, type=pool_type, **given))
        return
    if pool.type == _PROCESS and pool.base_job_template != template:
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def _create_queue(client: SyncPrefectClient, pool: str, name: str, *, limit: int) -> None:
    """Create a queue of a pool when it is missing; a limit that was changed on its page stays."""
    try:
        client.read_work_queue_by_name(name, work_pool_name=pool)
    except ObjectNotFound:
        client.create_work_queue(name, work_pool_name=pool, concurrency_limit=limit)


def _put_automation(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Create an automation, or bring the one of this name to what the file says; a pause stays.

    One that is right is left alone: an update forgets which runs are being waited for, and a run that fell silent just
    before would never be marked.
    """
    for found in client.read_automations_by_name(automation.name):
        if _content(found) != _content(automation):
            automation.enabled = found.enabled
            client.update_automation(found.id, automation)
        return
    client.create_automation(automation)


def _content(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(mode="json", include={"description", "trigger", "actions"})
