"""The temporary server of a run by hand is gone when its process is, killed or not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

_ROOT = Path(__file__).parents[2]
_CODE = """
import psutil
from flows.temporary_server import starting_server
with starting_server():
    print("body", flush=True)
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    assert client.api_healthcheck() is None
servers = [child.pid for child in psutil.Process().children() if "flows.service.temporary" in child.cmdline()]
print(*servers, flush=True)
input()
"""


_TWO = """
from flows.console import prepare_environment
prepare_environment(cache=True)
from flows.temporary_server import ServerStartError, starting_server
try:
    with starting_server():
        pass
    print("started", flush=True)
except ServerStartError as error:
    print(error, flush=True)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all."""
    return tmp_path_factory.mktemp("servers") / "home"


def _begin(home: Path, **variables: str) -> "subprocess.Popen[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "SFT_"))}
    environment = {**kept, "SFT_HOME": str(home), "PYTHONPATH": str(_ROOT), **variables}
    return subprocess.Popen([sys.executable, "-c", _TWO], env=environment, stdout=subprocess.PIPE, text=True)


def test_two_first_runs_of_a_home_start_one_after_the_other(home: Path) -> None:
    both = [_begin(home, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="240") for _ in range(2)]
    assert [process.communicate(timeout=500)[0] for process in both] == ["started\n"] * 2


def test_killed_process_leaves_no_server(home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment |= {"PREFECT_HOME": str(home / "prefect"), "PYTHONPATH": str(_ROOT)}
    environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
    with subprocess.Popen(
        [sys.executable, "-c", _CODE], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "body\n"
        (server,) = map(int, process.stdout.readline().split())
        assert psutil.pid_exists(server)
        process.kill()
    end = time.monotonic() + 30
    while psutil.pid_exists(server) and psutil.Process(server).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the server outlives the run that started it"
        time.sleep(0.2)


def test_a_server_that_does_not_start_is_said_in_words(home: Path) -> None:
    with _begin(home, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="1") as process:
        said = process.communicate(timeout=120)[0]
    assert said.startswith("Prefect's temporary server: Timed out")
    assert "sft serve" in said
