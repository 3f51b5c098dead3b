"""`sft clean` beside running servers: what is old goes from both, what is in use stays, and no server logs an error."""

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from flows.cleaning import measure
from flows.service import processes, servers
from flows.service.databases import prepare_databases
from flows.service.settings import read_settings
from schemas.artifacts import AdapterRef
from tasks import tracking
from tests.end_to_end.service import Service, small_config, wait_until
from tests.laboratory.month import STAGES, Stage, Template, record_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SFT_SERVICE_TESTS" not in os.environ, reason="takes minutes: set SFT_SERVICE_TESTS=1"),
]
_minutes = pytest.mark.skipif(
    os.environ.get("SFT_SERVICE_TESTS") not in ("faults", "all"),
    reason="takes minutes more: set SFT_SERVICE_TESTS=faults",
)
_PIPELINE, _SERVERS = "sft-pipeline/sft-pipeline", (servers.PREFECT, servers.MLFLOW)
_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_DAYS, _MODEL_BYTES = 11, 300_000


@pytest.fixture(autouse=True)
def _pointed_here(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process's MLflow at the service."""
    for name, value in {**service.client, "SFT_HOME": str(service.home)}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _errors(service: Service) -> Iterator[None]:
    """Fail where a server logs an error."""
    logs = {name: processes.log_file(service.folder, name) for name in _SERVERS}
    before = {name: log.stat().st_size for name, log in logs.items()}
    yield
    said = {name: log.read_bytes()[before[name] :].decode(errors="replace") for name, log in logs.items()}
    assert {name: log for name, log in said.items() if "Traceback" in log or "ERROR" in log} == {}


@pytest.fixture
def template(tmp_path: Path) -> Template:
    model = tmp_path / "template" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"x" * _MODEL_BYTES)
    (model / "config.json").write_text("{}")
    return Template("cleaned", model, {name: Stage({"a": "1"}) for name in STAGES})


def _age(service: Service, runs: list[str], flow_run: str) -> None:
    """Let runs have ended some days earlier, in the servers' own databases."""
    urls = prepare_databases(read_settings(service.environment))
    prefect = make_url(urls.prefect)
    is_sqlite = prefect.get_backend_name() == "sqlite"
    then = datetime.now(UTC) - timedelta(days=_DAYS)
    end = then.strftime("%Y-%m-%d %H:%M:%S.%f") if is_sqlite else then
    driver = "sqlite" if is_sqlite else "postgresql+psycopg2"
    for database, change, ended, names in (
        (urls.mlflow, "UPDATE runs SET end_time = :ended WHERE run_uuid = :name", int(then.timestamp() * 1000), runs),
        (
            prefect.set(drivername=driver),
            "UPDATE flow_run SET end_time = :ended WHERE CAST(id AS TEXT) = :name",
            end,
            [flow_run],
        ),
    ):
        engine = create_engine(database)
        with engine.begin() as connection:
            for name in names:
                assert connection.execute(text(change), {"ended": ended, "name": name}).rowcount == 1
        engine.dispose()


def _clean(service: Service, *arguments: str) -> str:
    """Clean as a person does who has sourced client.env, and gives the database as `make serve` does."""
    return Service({**service.environment, **service.client}, service.home).sft("clean", *arguments).stdout


def _end_a_flow_run(service: Service) -> str:
    """Start a rollback of a model that there is none of, and return the run when it has failed."""
    run = service.start("rollback/rollback", {"name": "no-such-model"})
    wait_until(lambda: service.run(run)["state"]["type"] in _ENDED, seconds=300)
    return run


def _is_there(service: Service, flow_run: str) -> bool:
    query = {"flow_runs": {"id": {"any_": [flow_run]}}}
    return bool(service.prefect("POST", "/flow_runs/count", query))


def test_old_runs_leave_both_servers_while_another_is_recorded(
    service: Service, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, flow_run = [record_run(template, number) for number in range(2)], _end_a_flow_run(service)
    _age(service, runs, flow_run)
    artifacts = service.home / "artifacts"
    before, folders = measure(artifacts), len(list(artifacts.rglob("*")))
    with ThreadPoolExecutor() as pool:
        recorded = pool.submit(record_run, template, 9)
        said = _clean(service, "--days", str(_DAYS - 1), "--versions", "0")
        runs.append(recorded.result())
    assert "MLflow run: 2 deleted" in said
    assert [tracking.is_deleted(run) for run in runs] == [True, True, False]
    assert not _is_there(service, flow_run)
    versions = tracking.client().search_model_versions("name = 'cleaned'")
    assert sorted(int(version.version) for version in versions) == [3]
    assert measure(artifacts) <= before - _MODEL_BYTES, "two models went and one came"
    assert len(list(artifacts.rglob("*"))) < folders, "empty folders stay"
    logged = Path(tracking.client().download_artifacts(runs[-1], "logs", str(tmp_path)))
    assert (logged / "run-1.log").read_text() == "log\n" * 200
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert tracking.recorded_config(runs[-1])["name"] == template.name
    assert list((tmp_path / "temporary").iterdir()) == []


@_minutes
def test_a_run_that_is_worked_on_ends_well_beside_cleanings(service: Service, tmp_path: Path) -> None:
    run, num_cleanings = service.start(_PIPELINE, {"config": small_config(tmp_path)}), 0
    while (state := service.run(run)["state"])["type"] not in _ENDED:
        _clean(service, "--days", "0.01", "--versions", "0", "--runs", "1")
        num_cleanings += 1
    assert state["type"] == "COMPLETED", state["message"]
    assert num_cleanings > 1
    (version,) = tracking.client().search_model_versions(f"tag.`sft.prefect_flow_run` = '{run}'")
    adapter = tracking.recall(str(version.tags["sft.run"]), "train", AdapterRef)
    assert adapter is not None
    tracking.resolve(adapter)  # compares it with its digest
