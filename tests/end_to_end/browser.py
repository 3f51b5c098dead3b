"""A real browser on the pages of a served pipeline."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.end_to_end.service import Service

PROGRAM = shutil.which("chromium")
_OPTIONS = ["--no-sandbox"]  # as root it has none
_STEP_MILLISECONDS = 120_000


@contextmanager
def open_browser(service: Service, *options: str) -> Iterator[Any]:
    """Give a page that is logged in to Prefect, in a browser with these options."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=[*_OPTIONS, *options])
        password = service.client["MLFLOW_TRACKING_PASSWORD"]
        # MLflow's log-in is the browser's own, Prefect has a page for it.
        page = browser.new_context(
            viewport={"width": 1280, "height": 900},
            http_credentials={"username": "admin", "password": password, "origin": mlflow_page(service)},
        ).new_page()
        page.set_default_timeout(_STEP_MILLISECONDS)
        page.goto(service.client["PREFECT_UI_URL"])
        page.locator("input[type=password]").fill(service.client["PREFECT_API_AUTH_STRING"])
        page.get_by_role("button", name="Login").click()
        page.wait_for_url("**/dashboard**")
        yield page
        browser.close()


def mlflow_page(service: Service) -> str:
    """Return the address of MLflow's pages."""
    return service.client["MLFLOW_TRACKING_URI"]


def open_form(page: Any, service: Service, deployment: str) -> None:
    """Open the form that starts a run."""
    page.goto(f"{service.client['PREFECT_UI_URL']}/deployments/deployment/{service.deployment(deployment)['id']}/run")
    page.get_by_role("button", name="Submit").wait_for()


def field(page: Any, label: str) -> Any:
    """Return the input under the label that begins with this text."""
    begins = re.compile(rf"^\s*{re.escape(label)}")
    return page.locator("label", has_text=begins).first.locator("xpath=following::*[self::input or self::textarea][1]")


def open_model(page: Any, service: Service, name: str) -> None:
    """Open a registered model's page with nothing of MLflow's own before its versions."""
    page.goto(f"{mlflow_page(service)}/#/models/{name}")
    page.get_by_text("Version 1", exact=True).first.wait_for()
    assistant = page.get_by_role("button", name="Close", exact=True)
    if assistant.is_visible():
        assistant.click()
    page.get_by_text("Tags", exact=True).first.click()  # folds the long trail; its table is in the description


def rest(page: Any) -> None:
    """Leave the pages: drawing them takes half a core from the runs that they show."""
    page.goto("about:blank")


def keep(page: Any, name: str) -> None:
    """Keep a screenshot where SFT_SCREENSHOTS says, as test output."""
    folder = Path(os.environ.get("SFT_SCREENSHOTS", ".sft/screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")
