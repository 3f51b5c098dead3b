"""In a flow, the shards of a large dataset are tasks of their own, and a finished one is not read again."""

import json
from collections import Counter
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run

from schemas.artifacts import DatasetRef
from schemas.config import DataConfig, RunConfig
from schemas.loading import parse_config
from tasks import tracking
from tasks.ingestion import task as ingestion
from tasks.ingestion.dataset import build_dataset
from tests.end_to_end.conftest import BASE_MODEL

pytestmark = pytest.mark.slow


@flow
def read(config: RunConfig, seed: int) -> tuple[DatasetRef, str]:
    """Read a dataset as the pipeline does, and tell the id of this flow run."""
    run = tracking.create_parent_run(config, run_name="shards", config_digest=f"shards-{seed}", tags={})
    source = ingestion.locate_dataset(config.data)
    return ingestion.ingest(source, config.data, seed=seed, parent_run_id=run), str(flow_run.id)


def count_states(flow_run_id: str) -> Counter[tuple[str, str]]:
    """Return how many tasks of a flow run, by the first word of their names, ended in which state."""
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    return Counter((run.name.split()[0], str(run.state_name)) for run in runs)


@pytest.mark.usefixtures("run_pipeline")
def test_shards_of_a_finished_reading_are_used_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestion, "SHARD_BYTES", 4000)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q {n}", "completion": f"a {n}"}) + "\n" for n in range(500)))
    config = parse_config({"name": "tests", "model": {"base_model": str(BASE_MODEL)}, "data": {"source": str(path)}})
    first, first_run = read(config, 0)
    again, again_run = read(config, 1)
    assert count_states(first_run) == {("locate", "Completed"): 1, ("ingest", "Completed"): 1, ("read", "Completed"): 6}
    assert count_states(again_run) == {("locate", "Completed"): 1, ("ingest", "Completed"): 1, ("read", "Cached"): 6}
    assert (first.rows_train, first.rows_eval) == (again.rows_train, again.rows_eval) == (450, 50)
    assert first.digest != again.digest
    whole = build_dataset(DataConfig(source=str(path)), seed=0, folder=tmp_path / "whole")
    assert whole.rows_train == 450
    table = tracking.resolve(first) / "train.parquet"
    assert table.read_bytes() == (tmp_path / "whole" / "train.parquet").read_bytes()
