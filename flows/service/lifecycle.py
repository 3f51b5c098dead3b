"""`sft serve` and `sft stop`: all servers and workers of this machine, up or down."""

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.service import deployments, processes, servers
from flows.service.credentials import (
    client_file,
    client_variables,
    credentials_file,
    load_credentials,
    write_private,
)
from flows.service.databases import prepare_databases
from flows.service.settings import ServiceSettings
from tasks.storage import make_home

_WORKER_SECONDS = 120.0
_GPU_RUNS = 1  # as the concurrency limits in prefect.yaml


@dataclass(frozen=True)
class Service:
    """What runs now, for a person."""

    prefect_page: str
    mlflow_page: str
    user: str | None
    """Of the log-in; none where no log-in is asked for."""
    folder: Path
    seconds: float
    new_password: str | None = None
    """Of a log-in that was made just now."""

    def describe(self, *, show_password: bool = False) -> list[str]:
        """Return the lines that `sft serve` ends with.

        Args:
            show_password: tell a new password, once; it stays in its file otherwise. Only for a person's terminal.
        """
        client = shlex.quote(str(client_file(self.folder)))
        where = f"SFT_PASSWORD in {credentials_file(self.folder)}"
        password, told = "password", f"the password is {where}"
        if show_password and self.new_password:
            password, told = (
                self.new_password,
                f"password [bold]{self.new_password}[/] (shown once; it stays as {where})",
            )
        login = [
            f"Log in  as [bold]{self.user}[/], {told}",
            f"        Prefect's page asks for both in one field: [bold]{self.user}:{password}[/]",
        ]
        return [
            f"Prefect [bold]{self.prefect_page}[/]  runs, schedules, the form to start a run",
            f"MLflow  [bold]{self.mlflow_page}/#/experiments?workflowType=machine_learning[/]  results, artifacts, "
            "the model registry",
            "        Click [bold]Model training[/] on its left once: MLflow begins with its pages for traces",
            *(login if self.user is not None else []),
            f"Shell   set -a; . {client}; set +a   points the commands here at these servers",
            f"Logs    {self.folder / 'logs'}",
            f"Ready after {self.seconds:.0f} s. `sft stop` (`make stop`) ends all of it.",
        ]


def serve(settings: ServiceSettings, *, say: Callable[[str], None]) -> Service:
    """Start what is not running yet, and return when everything answers.

    Raises:
        ServiceError: something cannot be started; what this call started is stopped again.
    """
    began = time.monotonic()
    make_home()
    with processes.only_one(settings.folder):
        credentials = load_credentials(settings.folder) if settings.auth else None
        client = client_variables(settings, credentials)
        before = processes.names(settings.folder)
        try:
            say("Preparing the databases" if settings.database_url is None else "Preparing the databases in PostgreSQL")
            urls = prepare_databases(settings)
            say("Starting the Prefect server and the MLflow server")
            servers.start_prefect(settings, urls, credentials)
            servers.start_mlflow(settings, urls, credentials)
            servers.wait_for_servers(settings, credentials)
            write_private(client_file(settings.folder), client)
            with pointed_at(client):
                say("Creating work pools, deployments and automations")
                deployments.deploy_all({**servers.base_environment(settings), **client})
                say("Starting the workers")
                _start_workers(settings, client)
        except BaseException:
            if not before:
                _stop(settings)
            raise
    return Service(
        prefect_page=client["PREFECT_UI_URL"],
        mlflow_page=settings.page(settings.mlflow_port),
        user=credentials.user if credentials is not None else None,
        folder=settings.folder,
        seconds=time.monotonic() - began,
        new_password=credentials.password if credentials is not None and credentials.is_new else None,
    )


def stop(settings: ServiceSettings) -> int:
    """Stop everything of this SFT_HOME, runs included, and return how many processes there were."""
    with processes.only_one(settings.folder):
        return _stop(settings)


@contextmanager
def pointed_at(client: dict[str, str]) -> Iterator[None]:
    """Let Prefect's clients in this process talk to the service."""
    values = {PREFECT_API_URL: client["PREFECT_API_URL"]}
    if "PREFECT_API_AUTH_STRING" in client:
        values[PREFECT_API_AUTH_STRING] = client["PREFECT_API_AUTH_STRING"]
    with temporary_settings(values):
        yield


def _start_workers(settings: ServiceSettings, client: dict[str, str]) -> None:
    servers.start_worker(settings, servers.CPU_WORKER, client, limit=None)
    servers.start_worker(settings, servers.GPU_WORKER, client, limit=_GPU_RUNS)
    for name, pool in servers.POOLS.items():
        processes.wait_until(
            lambda pool=pool: deployments.worker_is_online(pool),  # type: ignore[misc]
            settings.folder,
            name,
            seconds=_WORKER_SECONDS,
        )


def _stop(settings: ServiceSettings) -> int:
    number = processes.stop_all(settings.folder, servers.STOP_ORDER)
    client_file(settings.folder).unlink(missing_ok=True)
    return number
