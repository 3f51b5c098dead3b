"""Whole pipeline runs, in this process, on Prefect's temporary server and a private SFT_HOME."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from schemas.artifacts import RunReport
from schemas.loading import parse_config
from tests.end_to_end.reader import Reader, make_reader
from tests.end_to_end.service import (
    Service,
    make_secret,
    postgres_programs,
    running_postgres,
    service_environment,
)
from tests.prefect_server import prefect_server

ROOT = Path(__file__).resolve().parents[2]
BASE_MODEL = ROOT / "deploy" / "demo" / "base_model"
RunPipeline = Callable[..., RunReport]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private SFT_HOME for the session, and nothing of the caller's servers."""
    folder = tmp_path_factory.mktemp("sft-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(folder))
        patch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(folder / "results"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("PREFECT_API_URL", raising=False)
        yield folder


@pytest.fixture(scope="session")
def run_pipeline(home: Path) -> Iterator[RunPipeline]:
    """Give a function that runs the flow with nested settings over a small default config."""
    from flows.pipeline import sft_pipeline

    def run(settings: dict[str, Any], **options: Any) -> RunReport:
        values = {
            "name": "tests",
            "model": {"base_model": str(BASE_MODEL)},
            "evaluation": {"batch_size": 16, "max_new_tokens": 24, "num_resamples": 200},
            **settings,
        }
        return sft_pipeline(parse_config(values), **options)

    with prefect_server(home / "prefect"):
        yield run


@pytest.fixture(scope="session")
def reader(run_pipeline: RunPipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Somebody who types what the pages say; a command that one test has typed is done for all of them."""
    from prefect.settings import PREFECT_API_URL

    reader = make_reader(tmp_path_factory.mktemp("clone"), str(PREFECT_API_URL.value()))
    yield reader
    reader.close()


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Give a function that writes rows as JSONL and returns the file."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def command_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment for `sft` in a process of its own: private SFT_HOME and Prefect database."""
    folder = tmp_path_factory.mktemp("command")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SFT_"))}
    return {**kept, "SFT_HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect")}


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Everything that `sft serve` starts, on PostgreSQL where there is one; SFT_SERVICE_DATABASE=sqlite: on SQLite."""
    home = tmp_path_factory.mktemp("service")
    secret = make_secret()
    variables = {"HF_TOKEN": make_secret(), "AWS_SECRET_ACCESS_KEY": make_secret()}
    with ExitStack() as stack:
        if postgres_programs() is not None and os.environ.get("SFT_SERVICE_DATABASE") != "sqlite":
            address = stack.enter_context(running_postgres(secret))
            variables["SFT_DATABASE_URL"] = f"postgresql://sft:{quote(secret, safe='')}@{address}"
        served = Service(service_environment(home, **variables), home)
        stack.callback(served.sft, "stop")
        served.sft("serve")
        yield served
