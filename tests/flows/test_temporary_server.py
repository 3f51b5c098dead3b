"""The temporary server of a run by hand is gone when its process is, killed or not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

_ROOT = Path(__file__).parents[2]
_CODE = """
import psutil
from flows.temporary_server import starting_server
with starting_server():
    print("body", flush=True)
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    assert client.api_healthcheck() is None
servers = [child.pid for child in psutil.Process().children() if any("prefect.server" in w for w in child.cmdline())]
print(*servers, flush=True)
input()
"""


def test_killed_process_leaves_no_server(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment |= {"PREFECT_HOME": str(tmp_path), "PYTHONPATH": str(_ROOT)}
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
