"""The command of docs/service.md makes a pool of Kubernetes jobs out of the template."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).resolve().parents[2]
_COMMAND = "prefect work-pool create gpu --type kubernetes --base-job-template deploy/kubernetes/gpu-pool.json"


def test_the_printed_command_makes_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    with prefect_test_harness(server_startup_timeout=300):
        monkeypatch.setenv("PREFECT_API_URL", PREFECT_API_URL.value())
        command = [sys.executable, "-m", *_COMMAND.split()]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        with get_client(sync_client=True) as client:
            pool = client.read_work_pool("gpu")
    assert pool.type == "kubernetes"
    template = json.loads((_ROOT / "deploy" / "kubernetes" / "gpu-pool.json").read_text(encoding="utf-8"))
    assert pool.base_job_template == template
