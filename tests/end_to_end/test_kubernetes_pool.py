"""The command of docs/service.md makes a pool of Kubernetes jobs out of the template."""

import json
import subprocess
import sys

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from tests.end_to_end.conftest import ROOT

pytestmark = pytest.mark.slow

_COMMAND = "prefect work-pool create gpu --type kubernetes --base-job-template deploy/kubernetes/gpu-pool.json"


@pytest.mark.usefixtures("run_pipeline")
def test_the_printed_command_makes_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))  # of the session's server
    command = [sys.executable, "-m", *_COMMAND.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    with get_client(sync_client=True) as client:
        pool = client.read_work_pool("gpu")
    assert pool.type == "kubernetes"
    template = json.loads((ROOT / "deploy" / "kubernetes" / "gpu-pool.json").read_text(encoding="utf-8"))
    assert pool.base_job_template == template
