"""The servers and workers of one machine: what each is started with, and how to tell that it answers."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from flows.service import guard, processes
from flows.service.credentials import Credentials
from flows.service.databases import DatabaseUrls
from flows.service.settings import ServiceError, ServiceSettings
from tasks.allowed_roots import ROOTS

ROOT = Path(__file__).resolve().parents[2]
PREFECT, MLFLOW, CPU_WORKER, GPU_WORKER = "prefect-server", "mlflow-server", "cpu-worker", "gpu-worker"
# The GPU's worker first: a pipeline that ends before its stage cancels it, and a stage that is asked to end once more
# does not wait for its checkpoint.
STOP_ORDER = (GPU_WORKER, CPU_WORKER, PREFECT, MLFLOW)
POOLS = {CPU_WORKER: "cpu", GPU_WORKER: "gpu"}
MLFLOW_APP = "sft-pipeline"
"""The guarded server among MLflow's apps: an entry point of this package."""
_START_SECONDS = 180.0  # on a busy machine of two cores; a quiet one takes ten
_VACUUM = {
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(90 * 86_400),  # seconds
}
# Of the caller's own: a service must not be steered by what a shell happens to have set for its clients.
_OWN = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_UI_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI")


def base_environment(settings: ServiceSettings) -> dict[str, str]:
    """Return the environment that all of them share."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OWN and name != "SFT_DATABASE_URL"}
    home = settings.folder.parent
    return {
        **inherited,
        "SFT_HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONUNBUFFERED": "1",
    }


def start_prefect(settings: ServiceSettings, urls: DatabaseUrls, credentials: Credentials | None) -> None:
    """Start the Prefect server."""
    environment = base_environment(settings) | {
        "PREFECT_API_DATABASE_CONNECTION_URL": urls.prefect,
        # A GPU's place is a lease; kept in memory it would be lost with the server, and the run with its next renewal.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # Prefect copies its pages beside its code otherwise, which may be read-only.
        "PREFECT_UI_STATIC_DIRECTORY": str(settings.folder.parent / "prefect" / "ui"),
        # Where browsers find the API; behind a reverse proxy its address is given.
        "PREFECT_UI_API_URL": os.environ.get("PREFECT_UI_API_URL") or f"{settings.page(settings.prefect_port)}/api",
        # Flow runs that ended long ago go with task runs, logs and artifacts; events go after a week by themselves.
        **{name: os.environ.get(name, value) for name, value in _VACUUM.items()},
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(settings.origins(settings.prefect_port)),
        **_guard_variables(settings, settings.prefect_port),
    }
    if credentials is not None:
        environment["PREFECT_SERVER_API_AUTH_STRING"] = f"{credentials.user}:{credentials.password}"
    # Prefect's own command starts this app without the guard; it has no setting for one.
    command = [sys.executable, "-m", "uvicorn", "--factory", "flows.service.guard:create_prefect"]
    command += ["--host", settings.host, "--port", str(settings.prefect_port), "--log-level", "warning"]
    _start_server(settings, PREFECT, settings.prefect_port, command, environment)


def start_mlflow(settings: ServiceSettings, urls: DatabaseUrls, credentials: Credentials | None) -> None:
    """Start the MLflow server, which also passes artifacts on: clients need no access to their store."""
    environment = base_environment(settings) | {
        "MLFLOW_BACKEND_STORE_URI": urls.mlflow,  # not an argument: every user of the machine can read those
        "MLFLOW_ARTIFACTS_DESTINATION": settings.artifacts,
        # No assistants and no background jobs of its own: nothing here uses them, and each is a process more.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # MLflow's own check of these lets every page of this machine write, so the guard comes before it.
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(_mlflow_hosts(settings)),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(settings.origins(settings.mlflow_port)),
        guard.AUTH: "off" if credentials is None else "on",
        **_guard_variables(settings, settings.mlflow_port),
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", settings.host, "--port", str(settings.mlflow_port)]
    # One process: several of uvicorn's share a socket without TCP_NODELAY, and each answer then waits 40 ms and more
    # for the client's acknowledgement, of which a run sees hundreds. Its threads take calls side by side all the same.
    command += ["--serve-artifacts", "--workers", "1", "--app-name", MLFLOW_APP]
    if credentials is not None:
        environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(_write_auth_config(settings, urls)),
            "MLFLOW_AUTH_ADMIN_USERNAME": credentials.user,
            "MLFLOW_AUTH_ADMIN_PASSWORD": credentials.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": credentials.cookie_key,
        }
    _start_server(settings, MLFLOW, settings.mlflow_port, command, environment)


def start_worker(settings: ServiceSettings, name: str, client: Mapping[str, str], *, limit: int | None) -> None:
    """Start a worker that runs flows as processes of this machine."""
    from flows.environment import run_defaults

    # Asked five times as often as by default: a run with its stages on the GPU pool waits four or five times.
    roots = (settings.folder.parent, Path.cwd(), ROOT / "deploy" / "demo")
    defaults = {**run_defaults(), "PREFECT_WORKER_QUERY_SECONDS": "2", ROOTS: os.pathsep.join(map(str, roots))}
    environment = {**defaults, **base_environment(settings), **client}
    command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", POOLS[name]]
    command += ["--name", f"{name}-{socket.gethostname()}"]
    if limit is not None:
        command += ["--limit", str(limit)]
    processes.start(settings.folder, name, command, environment, ROOT)


def wait_for_servers(settings: ServiceSettings, credentials: Credentials | None) -> None:
    """Wait until both servers answer, and let this log-in in.

    Raises:
        ServiceError: one ended, or refuses the log-in that is on file.
    """
    for name, url in ((PREFECT, f"{settings.prefect_url}/api/health"), (MLFLOW, f"{settings.mlflow_url}/health")):
        processes.wait_until(lambda url=url: _answers(url), settings.folder, name, seconds=_START_SECONDS)  # type: ignore[misc]
    if credentials is None:
        return
    login = (credentials.user, credentials.password)
    for name, url in (
        (PREFECT, f"{settings.prefect_url}/api/admin/version"),
        (MLFLOW, f"{settings.mlflow_url}/api/2.0/mlflow/users/get?username={credentials.user}"),
    ):
        answer = httpx.get(url, auth=login, timeout=30)
        if answer.status_code != httpx.codes.OK:
            raise ServiceError(
                f"{name} refuses the log-in of {settings.folder / 'credentials.env'} (HTTP {answer.status_code}): its "
                "database was made with another one. Put that file back, or start with an empty database"
            )


def _guard_variables(settings: ServiceSettings, port: int) -> dict[str, str]:
    return {guard.HOSTS: ",".join(settings.hosts), guard.ORIGINS: ",".join(settings.origins(port))}


def _mlflow_hosts(settings: ServiceSettings) -> list[str]:
    """Return the names as MLflow compares them: with any port or none, brackets escaped."""
    return [name for host in settings.hosts for name in (host, f"{host.replace('[', '[[]', 1)}:*")]


def _start_server(
    settings: ServiceSettings, name: str, port: int, command: list[str], environment: dict[str, str]
) -> None:
    if processes.find(settings.folder, name) is None:
        _check_port(settings.host, port, name)
    processes.start(settings.folder, name, command, environment, settings.folder)


def _check_port(host: str, port: int, name: str) -> None:
    """Refuse a port that another program has."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            variable = "SFT_PREFECT_PORT" if name == PREFECT else "SFT_MLFLOW_PORT"
            raise ServiceError(
                f"{name}: {host}:{port} cannot be listened on ({error.strerror}): stop what uses it, or set {variable}"
            ) from None


def _write_auth_config(settings: ServiceSettings, urls: DatabaseUrls) -> Path:
    """Write MLflow's own settings of log-ins; new users see what a registry holds and change nothing."""
    path = settings.folder / "mlflow-auth.ini"
    lines = {
        "default_permission": "READ",
        "database_uri": urls.mlflow_users.replace("%", "%%"),  # the file's own escape
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        # A password costs 60 ms and more to check, and clients send it with every call, of which a run makes hundreds.
        "auth_cache_ttl_seconds": "60",
    }
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("[mlflow]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items()))
    return path


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
