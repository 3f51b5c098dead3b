"""The servers as a team uses them: log-ins, the form in a real browser, events, and no secret left anywhere."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.service import processes
from flows.service.servers import STOP_ORDER
from tests.end_to_end.service import Service, small_config, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SFT_SERVICE_TESTS" not in os.environ, reason="takes minutes: set SFT_SERVICE_TESTS=1"),
]
# As root it has no sandbox.
_BROWSER_OPTIONS = ["--no-sandbox"]
_PIPELINE = "sft-pipeline/sft-pipeline"
_BROWSER = shutil.which("chromium")
_RUN_SECONDS = 600  # a run takes one of them on a quiet machine
_STEP_MILLISECONDS = 60_000


@pytest.fixture(scope="module")
def small(service: Service, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Let the form begin with settings of a run that takes seconds."""
    config = small_config(tmp_path_factory.mktemp("rows"))
    path = f"/deployments/{service.deployment(_PIPELINE)['id']}"
    service.prefect("PATCH", path, {"parameters": {"config": config}})
    return config


@pytest.fixture
def page(service: Service) -> Iterator[Any]:
    """A page of a real browser, logged in to Prefect."""
    if _BROWSER is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_BROWSER, args=_BROWSER_OPTIONS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(_STEP_MILLISECONDS)
        page.goto(service.client["PREFECT_UI_URL"])
        page.locator("input[type=password]").fill(service.client["PREFECT_API_AUTH_STRING"])
        page.get_by_role("button", name="Login").click()
        page.wait_for_url("**/dashboard**")
        yield page
        browser.close()


def _screenshot(page: Any, name: str) -> None:
    """Keep a screenshot where SFT_SCREENSHOTS says, as test output."""
    folder = Path(os.environ.get("SFT_SCREENSHOTS", ".sft/screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


def _pipeline_runs(service: Service) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.prefect("POST", "/flow_runs/filter", {"flows": _named("sft-pipeline")})
    return found


def _named(*flows: str) -> dict[str, Any]:
    return {"name": {"any_": list(flows)}}


def test_started_again_it_does_no_harm(service: Service) -> None:
    before = {name: processes.find(service.folder, name) for name in STOP_ORDER}
    service.sft("serve")
    assert {name: processes.find(service.folder, name) for name in STOP_ORDER} == before
    assert None not in before.values()


def test_both_servers_ask_for_the_log_in(service: Service) -> None:
    client = service.client
    prefect, mlflow = f"{client['PREFECT_API_URL']}/flows/count", f"{client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow"
    for login in (None, ("admin", "wrong")):
        assert httpx.post(prefect, json={}, auth=login).status_code == 401
        assert httpx.get(f"{mlflow}/experiments/get?experiment_id=0", auth=login).status_code == 401
    for file in ("credentials.env", "client.env", "mlflow-auth.ini"):
        assert (service.folder / file).stat().st_mode & 0o777 == 0o600


def test_a_run_started_from_the_form_ends_as_a_registered_model(
    service: Service, small: dict[str, Any], page: Any
) -> None:
    base = service.client["PREFECT_UI_URL"]
    page.goto(f"{base}/deployments/deployment/{service.deployment(_PIPELINE)['id']}/run")
    rank = page.locator("label", has_text="LoRA rank").locator("xpath=following::input[1]")
    rank.wait_for()
    labels = [text.removesuffix(" (Optional)") for text in page.locator("label").all_inner_texts()]
    sections = ["Base model", "Dataset", "Tokenization", "Training", "Merge", "Evaluation", "Registry"]
    assert [label for label in dict.fromkeys(labels) if label in sections] == sections  # in the pipeline's order
    assert page.get_by_text("Rank r of the adapter matrices.").is_visible()
    # A wrong value is refused, and nothing starts.
    rank.fill("2000")
    _screenshot(page, "form")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("less than or equal to").or_(page.get_by_text("maximum")).first.wait_for()
    _screenshot(page, "form-refuses")
    assert _pipeline_runs(service) == []
    rank.fill("8")
    page.get_by_role("button", name="Submit").click()
    wait_until(lambda: bool(_pipeline_runs(service)), seconds=60)
    (run,) = _pipeline_runs(service)
    assert run["parameters"]["config"]["training"]["rank"] == 8
    page.goto(f"{base}/runs/flow-run/{run['id']}")
    run = service.wait(run["id"], {"Completed"}, seconds=_RUN_SECONDS)
    assert run["name"].startswith("served: base_model on rows, ")
    page.wait_for_timeout(3000)
    _screenshot(page, "run")
    page.get_by_role("tab", name="Artifacts").or_(page.get_by_text("Artifacts", exact=True)).first.click()
    for key in ("accounting", "before-after", "registry"):
        page.get_by_text(key, exact=True).first.wait_for()
    _screenshot(page, "artifacts")
    children = service.prefect("POST", "/flow_runs/filter", {"flows": _named("train", "evaluate")})
    assert {child["state"]["name"] for child in children} == {"Completed"}
    assert {child["work_pool_name"] for child in children} == {"gpu"}
    version = httpx.get(
        f"{service.client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/registered-models/alias",
        params={"name": "served-model", "alias": "challenger"},
        auth=("admin", service.client["MLFLOW_TRACKING_PASSWORD"]),
    ).json()["model_version"]
    assert version["version"] == "1"


def test_a_wrong_setting_is_refused_before_anything_starts(service: Service, small: dict[str, Any]) -> None:
    wrong = {**small, "training": {**small["training"], "rnak": 8}}
    with pytest.raises(httpx.HTTPStatusError) as caught:
        service.start(_PIPELINE, {"config": wrong})
    assert caught.value.response.status_code == 409
    assert "rnak" in caught.value.response.text


def test_a_published_dataset_starts_a_run_on_it(service: Service, small: dict[str, Any]) -> None:
    service.prefect("PATCH", "/work_pools/cpu", {"is_paused": True})
    event = {
        "event": "dataset.published",
        "resource": {"prefect.resource.id": "dataset.rows"},
        "payload": {"uri": "/data/new.jsonl"},
        "occurred": "2026-01-01T00:00:00Z",
        "id": "5b2b2a4e-0f6a-4a4e-9d5e-0d5d5f5c5b5a",
    }
    service.prefect("POST", "/events", [event])
    found: list[dict[str, Any]] = []

    def started() -> bool:
        found[:] = [run for run in _pipeline_runs(service) if run["parameters"].get("dataset_uri")]
        return bool(found)

    try:
        wait_until(started, seconds=60)
        assert found[0]["parameters"]["dataset_uri"] == "/data/new.jsonl"
        assert found[0]["parameters"]["config"] == small
    finally:
        for run in found:
            service.prefect("DELETE", f"/flow_runs/{run['id']}")
        service.prefect("PATCH", "/work_pools/cpu", {"is_paused": False})


def test_no_secret_is_left_in_databases_logs_artifacts_or_command_lines(
    service: Service, small: dict[str, Any]
) -> None:
    secrets = {
        service.environment["HF_TOKEN"],
        service.environment["AWS_SECRET_ACCESS_KEY"],
        service.client["MLFLOW_TRACKING_PASSWORD"],
    }
    if "SFT_DATABASE_URL" in service.environment:
        secrets.add(service.environment["SFT_DATABASE_URL"].split(":")[2].split("@")[0])
    private = {"credentials.env", "client.env", "mlflow-auth.ini"}
    files = [path for path in service.home.rglob("*") if path.is_file() and path.name not in private]
    texts = {str(path): path.read_bytes() for path in files}
    texts |= {f"process {process.pid}": "\0".join(process.cmdline()).encode() for process in _running(service)}
    texts |= {f"database {name}": text for name, text in _dump_databases(service)}
    places = [where for where, text in texts.items() if small["data"]["source"].encode() in text]
    assert places  # what is no secret is found where it was recorded
    assert [where for where, text in texts.items() for secret in secrets if secret.encode() in text] == []


def _running(service: Service) -> list[Any]:
    return processes.marked(service.folder)


def _dump_databases(service: Service) -> Iterator[tuple[str, bytes]]:
    """Give the text of every PostgreSQL database; SQLite files are among the others."""
    url = service.environment.get("SFT_DATABASE_URL")
    for name in ("prefect", "mlflow", "users") if url else ():
        yield name, subprocess.run(["pg_dump", f"{url}/sft_{name}"], check=True, capture_output=True).stdout
