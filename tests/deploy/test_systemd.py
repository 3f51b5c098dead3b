"""systemd itself reads the units without a complaint."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from starlette.applications import Starlette

from flows.service.guard import guarded
from tests.end_to_end.service import ROOT

_UNITS = sorted(path for path in (ROOT / "deploy" / "systemd").iterdir() if path.suffix in (".service", ".timer"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_the_units_are_right(tmp_path: Path) -> None:
    assert len(_UNITS) == 5
    for unit in _UNITS:
        # The installation's place stands for a program that exists here; everything else is as it ships.
        text = unit.read_text()
        for program in ("prefect", "mlflow", "uvicorn", "sft"):
            text = text.replace(f"/opt/sft-pipeline/.venv/bin/{program}", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    units = [str(tmp_path / unit.name) for unit in _UNITS]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_units_begin_what_the_command_begins() -> None:
    texts = "".join(unit.read_text() for unit in _UNITS)
    assert "uvicorn --factory flows.service.guard:create_prefect --host 127.0.0.1 --port 4200" in texts
    assert "mlflow server --host 127.0.0.1 --port 5000 --serve-artifacts --workers 1 --app-name sft-pipeline" in texts
    assert "prefect worker start --type process --pool %i" in texts
    assert "PREFECT_WORKER_QUERY_SECONDS=2\n" in texts
    assert "KillMode=mixed" in texts  # no training outlives its worker's unit


def test_the_containers_workers_ask_for_work_as_often_as_those_of_the_command() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "docker" / "compose.yaml").read_text())["services"]
    for name in ("cpu-worker", "gpu-worker"):
        assert services[name]["environment"]["PREFECT_WORKER_QUERY_SECONDS"] == "2"
        assert services[name]["environment"]["PREFECT_API_URL"] == "http://prefect:4200/api"


def test_the_containers_servers_stand_behind_the_guard_too() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "docker" / "compose.yaml").read_text())["services"]
    assert "flows.service.guard:create_prefect" in services["prefect"]["command"]
    assert services["mlflow"]["command"][-2:] == ["--app-name", "sft-pipeline"]
    for name in ("prefect", "mlflow"):
        assert guarded(Starlette(), services[name]["environment"])
        assert name in services[name]["environment"]["SFT_GUARD_HOSTS"].split(",")
