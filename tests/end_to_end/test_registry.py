"""The flows on the registry, on a real Prefect server: data is published, versions move, and events say so."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.promote import promote
from flows.publish import publish
from flows.rollback import rollback
from schemas.artifacts import Published, RunReport
from tasks import tracking
from tasks.registration.audit import read_moves
from tests.end_to_end.conftest import BASE_MODEL, RunPipeline

pytestmark = pytest.mark.slow
_NAME = "kept"


@pytest.fixture(scope="module")
def published(run_pipeline: RunPipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Published]:
    """The same rows published twice; `run_pipeline` brings the server."""
    file = tmp_path_factory.mktemp("rows") / "numbers.jsonl"
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n}."} for n in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [publish(str(file), str(BASE_MODEL), requested_by="ann") for _ in range(2)]


@pytest.fixture(scope="module")
def reports(run_pipeline: RunPipeline, published: list[Published]) -> list[RunReport]:
    """Two runs on what the event names."""

    def run(max_steps: int) -> RunReport:
        (event,) = _events("dataset.published")
        settings: dict[str, Any] = {
            "data": {"source": event["payload"]["uri"]},
            "training": {"rank": 4, "alpha": 8, "max_steps": max_steps, "micro_batch": 8, "learning_rate": 2e-3},
            "registry": {"name": _NAME, "gate": {"require_significance": False}},
        }
        return run_pipeline(settings)

    return [run(2), run(1)]


def _events(name: str) -> list[dict[str, Any]]:
    """Return the events of this name; the server writes them down some seconds after it took them."""
    body = {"filter": {"event": {"name": [name]}, "order": "ASC"}, "limit": 50}
    end = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while True:
            found: list[dict[str, Any]] = client.request("POST", "/events/filter", json=body).json()["events"]
            if found or time.monotonic() > end:
                return found
            time.sleep(0.5)


def test_new_content_is_announced_once_with_its_address(published: list[Published]) -> None:
    assert [entry.is_new for entry in published] == [True, False]
    (event,) = _events("dataset.published")
    assert event["resource"]["prefect.resource.id"] == "dataset.numbers"
    assert event["payload"]["uri"] == published[0].address == "datasets:/numbers/1"
    assert event["payload"]["digest"] == published[0].digest


def test_a_run_on_the_published_address_is_named_by_it_and_has_all_rows(reports: list[RunReport]) -> None:
    assert reports[0].dataset.rows_in == 24
    run = tracking.get_run(reports[0].mlflow_run_id)
    assert "base_model on numbers/1, 20" in run.info.run_name
    assert run.data.params["data.source"] == "datasets:/numbers/1"


def test_the_flows_move_the_champion_and_tell_who_waits(reports: list[RunReport]) -> None:
    assert [report.registry.verdict for report in reports] == ["promoted", "refused"], reports[1].registry.reasons
    with pytest.raises(ValueError, match="the gate refused it"):
        promote(_NAME)
    promote(_NAME, reason="to see it in use", force=True, requested_by="ann")
    rollback(_NAME, reason="seen enough", requested_by="bob")
    moves = read_moves(_NAME)
    assert [(move.action, move.version_to, move.why) for move in moves[1:]] == [
        ("promote", "2", "to see it in use"),
        ("rollback", "1", "seen enough"),
    ]
    assert moves[2].who.startswith("bob by Prefect run ")
    assert [event["payload"]["uri"] for event in _events("model.promote")] == [f"models:/{_NAME}/2"]
    assert [event["payload"]["version"] for event in _events("model.rollback")] == ["1"]


def test_the_files_of_the_dataset_are_kept_with_their_check(published: list[Published]) -> None:
    folder = Path(tracking.client().download_artifacts(str(published[0].mlflow_run_id), ""))
    assert len((folder / "data" / "numbers.jsonl").read_text().splitlines()) == 24
    assert json.loads((folder / "check.json").read_text())["rows"]["rows in"] == 24
