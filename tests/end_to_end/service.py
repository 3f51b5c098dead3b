"""A served pipeline as tests hold it: started by the command, spoken to over HTTP, ended by the command."""

import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.service import processes, servers
from flows.service.credentials import client_file, load_credentials, read_variables
from flows.service.databases import prepare_databases
from flows.service.settings import read_settings

ROOT = Path(__file__).resolve().parents[2]
BASE_MODEL = ROOT / "deploy" / "demo" / "base_model"
_SERVE_SECONDS = 400


@dataclass
class Service:
    """A running service."""

    environment: dict[str, str]
    """Of `sft` and everything it starts."""
    home: Path

    @property
    def folder(self) -> Path:
        return self.home / "service"

    @property
    def client(self) -> dict[str, str]:
        """The variables of its clients."""
        return read_variables(client_file(self.folder))

    def sft(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command; its output is part of a failure."""
        command = [sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_SERVE_SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def bring_back(self, *names: str) -> None:
        """Start servers or workers again, as `sft serve` does, without deploying anew."""
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in self.environment.items():
                patch.setenv(variable, value)
            settings = read_settings()
            login = load_credentials(self.folder)
            begin = {servers.PREFECT: servers.start_prefect, servers.MLFLOW: servers.start_mlflow}
            for name in names:
                if name in servers.POOLS:
                    servers.start_worker(settings, name, self.client, limit=1)
                else:
                    begin[name](settings, prepare_databases(settings), login)
            servers.wait_for_servers(settings, login)

    def prefect(self, method: str, path: str, values: Any = None, **options: Any) -> Any:
        """Call Prefect's API; return its JSON."""
        user, _, password = self.client["PREFECT_API_AUTH_STRING"].partition(":")
        url = f"{self.client['PREFECT_API_URL']}{path}"
        answer = httpx.request(method, url, json=values, auth=(user, password), timeout=60, **options)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.prefect("GET", f"/deployments/name/{name}")
        return found

    def start(self, name: str, parameters: dict[str, Any]) -> str:
        """Start a run of a deployment, as the pages do, and return its id."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return str(self.prefect("POST", path, {"parameters": parameters, "state": {"type": "SCHEDULED"}})["id"])

    def cancel(self, flow_run_id: str) -> None:
        """Cancel a run, as the page's button does."""
        self.prefect("POST", f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING"}})

    def run(self, flow_run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.prefect("GET", f"/flow_runs/{flow_run_id}")
        return found

    def wait(self, flow_run_id: str, states: set[str], *, seconds: float) -> dict[str, Any]:
        """Wait until a run is in one of these states (names); fail when it ends in another."""
        found: dict[str, Any] = {}

        def reached() -> bool:
            found.update(self.run(flow_run_id))
            name = found["state"]["name"]
            final = found["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            assert name in states or not final, f"{name}: {found['state']['message']}"
            return name in states

        wait_until(reached, seconds=seconds)
        return found

    def process_of(self, flow_run_id: str) -> psutil.Process:
        """Return the process that works on a run."""
        for process in processes.marked(self.folder):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run_id:
                return process
        raise AssertionError(f"no process works on {flow_run_id}")


def wait_until(holds: Callable[[], bool], *, seconds: float) -> None:
    """Wait for a condition, asked five times a second."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"still waiting after {seconds} s"
        time.sleep(0.2)


def small_config(folder: Path) -> dict[str, Any]:
    """Return settings of a run that takes seconds, on rows written into the folder."""
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}."} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "served",
        "model": {"base_model": str(BASE_MODEL)},
        "data": {"source": str(folder / "rows.jsonl"), "eval_fraction": 0.2},
        "tokenization": {"max_length": 128},
        "training": {"rank": 4, "alpha": 8, "micro_batch": 8, "num_epochs": 4, "checkpoint_every_steps": 5},
        "evaluation": {"max_examples": 12, "max_new_tokens": 8, "num_resamples": 100},
        "merge": {"num_probes": 4, "probe_tokens": 4},
        "registry": {"name": "served-model", "gate": {"metric": "nll", "min_conversations": 10}},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_programs() -> Path | None:
    """Return the folder of the newest PostgreSQL server's programs, if there is one."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def running_postgres(password: str) -> Iterator[str]:
    """Run a PostgreSQL server of its own on loopback, and give its address without a database."""
    programs = postgres_programs()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="sft-postgres-"))
    owner = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name  # it refuses to run as root
    port = free_port()
    try:
        secret = folder / "password"
        secret.write_text(password)
        for path in (folder, secret):
            shutil.chown(path, owner)
        init: list[str | Path] = [
            programs / "initdb",
            "-D",
            folder / "data",
            "-U",
            "sft",
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
        ]
        subprocess.run([*init, "--no-sync"], user=owner, cwd=folder, check=True, capture_output=True)
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
        command: list[str | Path] = [programs / "postgres", "-D", folder / "data", "-p", str(port), *options]
        with subprocess.Popen(command, user=owner, cwd=folder, stderr=subprocess.DEVNULL) as server:
            ready: list[str | Path] = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
            try:
                wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, seconds=60)
                yield f"127.0.0.1:{port}"
            finally:  # also when the body fails: leaving the block waits for it to end
                server.terminate()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def service_environment(home: Path, **variables: str) -> dict[str, str]:
    """Return a clean environment for a service of its own on free ports."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SFT_"))}
    return {
        **kept,
        "SFT_HOME": str(home),
        "SFT_PREFECT_PORT": str(free_port()),
        "SFT_MLFLOW_PORT": str(free_port()),
        # Tests write their rows beside the home, and take the demo's base model.
        "SFT_DATA_ROOTS": os.pathsep.join([str(home.parent), str(ROOT)]),
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # in place of 10: tests need not wait as long for each run
        **variables,
    }


def make_secret() -> str:
    """Return a secret with the characters that addresses and settings files have to escape."""
    return f"p%2F@:{secrets.token_hex(8)}"
