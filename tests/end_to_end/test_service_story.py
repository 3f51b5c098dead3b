"""The service from a form to a rolled back version, as a person goes through it, on real servers and in a real browser.

A run is started in the browser, its model is in the registry and answers requests; new data is published, the run that
follows by itself beats the champion; the new champion is taken back by command and on the page.
"""

import json
import os
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import mlflow
import polars as pl
import pytest
import yaml

from flows.service import processes
from tasks import tracking
from tasks.registry.audit import list_moves
from tasks.registry.versions import get_model
from tests.end_to_end import browser
from tests.end_to_end.service import Service, free_port, small_config, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SFT_SERVICE_TESTS" not in os.environ, reason="takes minutes: set SFT_SERVICE_TESTS=1"),
    pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium on this machine"),
]
_PIPELINE, _NAME = "sft-pipeline/sft-pipeline", "served-model"
_SECTIONS = ["Base model", "Dataset", "Tokenization", "Training", "Merge", "Evaluation", "Registry"]
_RUN_SECONDS = 1800  # a run takes one minute or two on a quiet machine


@pytest.fixture(scope="module", autouse=True)
def _pointed_here(service: Service) -> Iterator[None]:
    """Point this process's MLflow at the service."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**service.client, "SFT_HOME": str(service.home)}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def small(service: Service, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Let the form begin with settings of a run that takes seconds."""
    config = small_config(tmp_path_factory.mktemp("rows"))
    path = f"/deployments/{service.deployment(_PIPELINE)['id']}"
    service.prefect("PATCH", path, {"parameters": {"config": config}})
    return config


@pytest.fixture(scope="module")
def page(service: Service) -> Iterator[Any]:
    with browser.open_browser(service) as page:
        yield page


@pytest.fixture(scope="module")
def first(service: Service, small: dict[str, Any], page: Any) -> dict[str, Any]:
    """A run started from the form with a rank of its own, followed to its end."""
    before = set(_runs(service, "sft-pipeline"))
    browser.open_form(page, service, _PIPELINE)
    browser.field(page, "LoRA rank").fill("8")
    page.get_by_role("button", name="Submit").click()
    run = _await_new_run(service, "sft-pipeline", before)
    browser.rest(page)
    return service.wait(run, {"Completed"}, seconds=_RUN_SECONDS)


@pytest.fixture(scope="module")
def second(
    service: Service, small: dict[str, Any], first: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """What `sft publish` said of more rows of the same kind, and the run that followed by itself."""
    before = set(_runs(service, "sft-pipeline"))
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}."} for n in range(100, 340)]
    file = tmp_path_factory.mktemp("published") / "numbers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = file.with_name("recipe.yaml")
    recipe.write_text(yaml.safe_dump(small))
    said = _sft(service, "publish", str(file), "--recipe", str(recipe))
    run = _await_new_run(service, "sft-pipeline", before)
    return said, service.wait(run, {"Completed"}, seconds=_RUN_SECONDS)


def _runs(service: Service, *flows: str) -> dict[str, dict[str, Any]]:
    found = service.prefect("POST", "/flow_runs/filter", {"flows": {"name": {"any_": list(flows)}}})
    return {run["id"]: run for run in found}


def _await_new_run(service: Service, flow: str, before: set[str]) -> str:
    wait_until(lambda: bool(set(_runs(service, flow)) - before), seconds=300)
    (run,) = set(_runs(service, flow)) - before
    return run


def _sft(service: Service, *arguments: str) -> str:
    """Run a command as a person does who has sourced client.env."""
    environment = {**service.environment, **service.client}
    done = Service(environment, service.home).sft(*arguments)
    return done.stdout + done.stderr


def _aliases() -> dict[str, str]:
    aliases = tracking.client().get_registered_model(_NAME).aliases
    return {alias: str(version) for alias, version in aliases.items()}


def _artifacts(parent: str, stage: str, name: str) -> Path:
    query = f"tags.`{tracking.PARENT_TAG}` = '{parent}' AND tags.`{tracking.STAGE_TAG}` = '{stage}'"
    (run,) = tracking.client().search_runs([tracking.get_run(parent).info.experiment_id], query)
    return Path(tracking.client().download_artifacts(run.info.run_id, name))


@contextmanager
def _served(service: Service, folder: Path) -> Iterator[str]:
    """Serve the champion with MLflow's own command, and give the address that takes requests."""
    port = str(free_port())
    programs = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # mlflow starts uvicorn by its name
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{_NAME}@champion"]
    command += ["--env-manager", "local", "--port", port, "--workers", "1"]
    with (folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            env={**service.environment, **service.client, **programs},
            cwd=folder,  # not the repository: the version stands alone
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/ping", server), seconds=240)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(address: str, server: "subprocess.Popen[bytes]") -> bool:
    assert server.poll() is None, "the model server ended: see serve.log"
    try:
        return httpx.get(address, timeout=5).is_success
    except httpx.TransportError:
        return False


def test_the_form_has_the_stages_in_order_and_refuses_a_wrong_value(
    service: Service, small: dict[str, Any], page: Any
) -> None:
    before = set(_runs(service, "sft-pipeline"))
    browser.open_form(page, service, _PIPELINE)
    rank = browser.field(page, "LoRA rank")
    rank.wait_for()
    labels = [text.removesuffix(" (Optional)") for text in page.locator("label").all_inner_texts()]
    assert [label for label in dict.fromkeys(labels) if label in _SECTIONS] == _SECTIONS
    assert page.get_by_text("Rank r of the adapter matrices.").is_visible()
    rank.fill("2000")
    browser.keep(page, "form")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("less than or equal to").or_(page.get_by_text("maximum")).first.wait_for()
    browser.keep(page, "form-refuses")
    assert set(_runs(service, "sft-pipeline")) == before


def test_a_run_from_the_form_shows_what_it_did(service: Service, first: dict[str, Any], page: Any) -> None:
    assert first["parameters"]["config"]["training"]["rank"] == 8
    assert first["name"].startswith("served: base_model on rows, ")
    children = _runs(service, "train", "evaluate").values()
    assert {child["work_pool_name"] for child in children} == {"gpu"}
    page.goto(f"{service.client['PREFECT_UI_URL']}/runs/flow-run/{first['id']}")
    page.get_by_role("tab", name="Artifacts").or_(page.get_by_text("Artifacts", exact=True)).first.click()
    for key in ("accounting", "before-after", "registry"):
        page.get_by_text(key, exact=True).first.wait_for()
    browser.keep(page, "artifacts")
    browser.rest(page)


def test_its_model_is_in_the_registry_with_both_aliases(service: Service, first: dict[str, Any], page: Any) -> None:
    browser.open_model(page, service, _NAME)
    for alias in ("challenger", "champion"):
        page.get_by_text(alias).first.wait_for()
    browser.keep(page, "registry")
    browser.rest(page)
    version = tracking.client().get_model_version(_NAME, "1")
    assert version.tags["sft.prefect_flow_run"] == first["id"]


def test_the_champion_answers_requests_with_the_prompt_ids_of_training(
    service: Service, first: dict[str, Any], tmp_path: Path
) -> None:
    tokens = _artifacts(str(tracking.client().get_model_version(_NAME, "1").tags["sft.run"]), "tokenize", "tokens")
    example = pl.read_parquet(tokens / "train.parquet").row(0, named=True)
    prompt = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == -100]
    answer = [label for label in example["labels"] if label != -100]
    messages = [{"role": "user", "content": example["question"]}]
    assert prompt + answer == list(example["input_ids"])
    loaded = mlflow.pyfunc.load_model(f"models:/{_NAME}@champion").unwrap_python_model()
    assert loaded.prompt_ids(messages) == prompt
    with _served(service, tmp_path) as address:
        reply = httpx.post(address, json={"messages": messages, "max_tokens": 6}, timeout=120).json()
    assert reply["usage"]["prompt_tokens"] == len(prompt)
    assert reply["choices"][0]["message"]["content"]


def test_published_data_starts_the_run_that_makes_the_next_champion(second: tuple[str, dict[str, Any]]) -> None:
    said, run = second
    assert "numbers version 1 is published as datasets:/numbers/1" in said
    assert "event dataset.published for dataset.numbers sent to http://127.0.0.1:" in said
    assert "recipe 1 of numbers: " in said
    assert run["parameters"]["dataset_uri"] == "datasets:/numbers/1"
    assert run["parameters"]["recipe"] == "numbers"
    assert run["name"] == "recipe of numbers on datasets:/numbers/1"
    tags = tracking.client().get_model_version(_NAME, "2").tags
    assert tags["sft.prefect_flow_run"] == run["id"]
    assert tags["sft.compared_with_champion"] == "1"
    assert _aliases() == {"challenger": "2", "champion": "2", "previous": "1"}


def test_the_champion_is_taken_back_by_command_and_on_the_page(
    service: Service, second: tuple[str, dict[str, Any]], page: Any
) -> None:
    assert "champion back to version 1 from version 2" in _sft(
        service, "rollback", _NAME, "--reason", "too fond of numbers"
    )
    assert _aliases()["champion"] == "1"
    _sft(service, "promote", f"{_NAME}/2", "--force", "--reason", "numbers are wanted")
    assert _aliases()["champion"] == "2"
    before = set(_runs(service, "rollback"))
    browser.open_form(page, service, "rollback/rollback")
    for label, value in (("name", _NAME), ("reason", "not that fond"), ("requested_by", "ann")):
        browser.field(page, label).fill(value)
    browser.keep(page, "rollback")
    page.get_by_role("button", name="Submit").click()
    run = _await_new_run(service, "rollback", before)
    browser.rest(page)
    service.wait(run, {"Completed"}, seconds=_RUN_SECONDS)
    assert _aliases()["champion"] == "1"
    moves = [(move.action, move.version_from, move.version_to, move.why) for move in list_moves(get_model(_NAME))[2:]]
    assert moves == [
        ("rollback", "2", "1", "too fond of numbers"),
        ("promote", "1", "2", "numbers are wanted"),
        ("rollback", "2", "1", "not that fond"),
    ]
    assert list_moves(get_model(_NAME))[-1].who.startswith("ann by Prefect run ")
    browser.open_model(page, service, _NAME)
    page.get_by_text("not that fond").first.wait_for()
    page.get_by_text("previous").or_(page.get_by_text("champion")).first.wait_for()
    browser.keep(page, "rolled-back")
    browser.rest(page)


def test_no_secret_is_left_in_databases_logs_artifacts_or_command_lines(
    service: Service, small: dict[str, Any], second: tuple[str, dict[str, Any]]
) -> None:
    password = service.client["MLFLOW_TRACKING_PASSWORD"]
    secrets = {service.environment["HF_TOKEN"], service.environment["AWS_SECRET_ACCESS_KEY"], password}
    secrets.add(b64encode(f"admin:{password}".encode()).decode())  # as a request carries it
    if "SFT_DATABASE_URL" in service.environment:
        quoted = service.environment["SFT_DATABASE_URL"].split(":")[2].split("@")[0]
        secrets |= {quoted, unquote(quoted)}
    private = {"credentials.env", "client.env", "mlflow-auth.ini"}
    files = [path for path in service.home.rglob("*") if path.is_file() and path.name not in private]
    texts = {str(path.relative_to(service.home)): path.read_bytes() for path in files}
    for process in processes.marked(service.folder):
        texts[f"process {process.pid}"] = "\0".join(process.cmdline()).encode()
    texts |= _dump_databases(service)
    # What is no secret is found where runs leave it, so that a secret would be.
    places = {where.partition("/")[0] for where, text in texts.items() if small["data"]["source"].encode() in text}
    assert places >= {"prefect.db", "mlflow.db", "artifacts"}
    assert any(where.startswith("service/logs/") and text for where, text in texts.items())
    assert [where for where, text in texts.items() for secret in secrets if secret.encode() in text] == []


def _dump_databases(service: Service) -> dict[str, bytes]:
    """Return the text of every PostgreSQL database; without one, the databases are among the files."""
    url = service.environment.get("SFT_DATABASE_URL")
    dumps = {}
    for name in ("prefect", "mlflow", "users") if url else ():
        done = subprocess.run(["pg_dump", f"{url}/sft_{name}"], check=True, capture_output=True)
        dumps[f"{name}.db"] = done.stdout
    return dumps


def test_the_logs_of_servers_and_workers_have_no_traceback_and_no_lost_message(
    service: Service, second: tuple[str, dict[str, Any]]
) -> None:
    logs = sorted((service.folder / "logs").glob("*.log"))
    assert [log.stem for log in logs] == ["cpu-worker", "gpu-worker", "mlflow-server", "prefect-server"]
    found = [
        f"{log.name}:{number}: {line}"
        for log in logs
        for number, line in enumerate(log.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if "Traceback" in line or "dead letter" in line
    ]
    assert found == []
