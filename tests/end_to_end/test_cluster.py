"""The demo from a bucket through a Ray cluster ends with the adapter of the demo from files on this machine's cores."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL

from flows.pipeline import sft_pipeline
from schemas.artifacts import AdapterRef, RunReport
from schemas.loading import load_config
from tasks import tracking
from tasks.ingestion import tables
from tasks.ingestion import task as ingestion
from tasks.storage import cached_folder, digest_folder
from tasks.stored_files import find_absent, read_list
from tasks.tokenization import shards
from tests.end_to_end.conftest import ROOT
from tests.object_store import serve_bucket

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="the ray extra is not installed"),
]
# Shards and row groups of a dataset of the demo's size, so that there is something to spread.
SHARD_BYTES, GROUP_ROWS, ROWS_PER_SHARD = 20_000, 200, 200
PROGRAM = f"""
from flows.session import prepare_session
prepare_session()
from tasks.ingestion import tables
from tasks.ingestion import task as ingestion
from tasks.tokenization import shards
ingestion.SHARD_BYTES, tables.GROUP_ROWS, shards.FEWEST_ROWS_PER_SHARD = {SHARD_BYTES}, {GROUP_ROWS}, {ROWS_PER_SHARD}
from flows.cli import main
main()
"""
DEMO = ROOT / "deploy" / "configs" / "demo.yaml"
SETTINGS = (  # a few steps: what all rows came to is compared by the digests of rows and tokens
    *("training.max_steps=8", "training.eval_every_steps=8"),
    *("evaluation.max_examples=20", "evaluation.max_new_tokens=8"),
    *("evaluation.questions=[]", "evaluation.probes=[]", "registry.gate.min_gain=0.0"),
)


def find_digests(report: RunReport) -> list[str]:
    """Return the digests of a run's rows, tokens and adapter; SFT_HOME is the run's."""
    tokens = Path(tracking.client().download_artifacts(find_stage(report, "tokenize"), "tokens"))
    adapter = tracking.recall(report.mlflow_run_id, "train", AdapterRef)
    assert adapter is not None
    return [report.dataset.digest, digest_folder(tokens), adapter.digest]


def find_stage(report: RunReport, stage: str) -> str:
    """Return the MLflow run of a stage."""
    experiment = tracking.get_run(report.mlflow_run_id).info.experiment_id
    query = f"tags.`{tracking.PARENT_TAG}` = '{report.mlflow_run_id}' AND tags.`{tracking.STAGE_TAG}` = '{stage}'"
    (run,) = tracking.client().search_runs([experiment], query)
    return str(run.info.run_id)


def run_here(monkeypatch: pytest.MonkeyPatch) -> RunReport:
    """Run the demo in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ingestion, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(tables, "GROUP_ROWS", GROUP_ROWS)
    monkeypatch.setattr(shards, "FEWEST_ROWS_PER_SHARD", ROWS_PER_SHARD)
    return sft_pipeline(load_config(DEMO, SETTINGS))


def run_there(home: Path, ray: str, *settings: str) -> RunReport:
    """Run the demo by the command, through Ray, in a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SFT_"))}
    # The session's Prefect server spares the command the start of one of its own.
    server = {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
    environment = {**kept, **server, "SFT_HOME": str(home), "SFT_RAY_ADDRESS": "local", "RAY_TMPDIR": ray}
    environment["SFT_ARTIFACTS"] = "s3://demo/artifacts"
    options = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    report = home.with_suffix(".json")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "run", str(DEMO), *options, "--report", str(report)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return RunReport.model_validate_json(report.read_text())


def check_rows(client: Any, report: RunReport) -> None:
    """Find the rows in the store, as workers have put them there, and none of the trained ones on this machine."""
    dataset = cached_folder(report.dataset.digest)
    assert dataset is not None
    stored = read_list(dataset)
    counts = json.loads((dataset / "quality.json").read_text(encoding="utf-8"))["counts"]
    assert sum(file.num_rows for file in stored.values()) == counts["rows_train"] + counts["rows_eval"] > 1000
    assert [name for name in find_absent(dataset) if name.startswith("train.parquet/")]
    assert not (dataset / "train.parquet").exists()
    place = f"artifacts/{find_stage(report, 'ingest')}/artifacts/dataset/"
    found = client.list_objects_v2(Bucket="demo", Prefix=place)["Contents"]
    sizes = {entry["Key"].removeprefix(place): entry["Size"] for entry in found}
    assert {name: sizes[name] for name in stored} == {name: file.num_bytes for name, file in stored.items()}
    left = client.list_objects_v2(Bucket="demo", Prefix=f"artifacts/{report.mlflow_run_id}/artifacts/shards/")
    assert not [entry for entry in left.get("Contents", []) if entry["Size"]]


@pytest.mark.usefixtures("run_pipeline")
def test_the_demo_from_a_bucket_through_ray_has_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run_here(monkeypatch)
    expected = find_digests(here)
    # A short path: the sockets in it may have a hundred characters.
    with serve_bucket("demo") as client, tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as ray:
        for name in ("train.jsonl", "heldout.jsonl"):
            client.upload_file(str(ROOT / "deploy" / "demo" / "data" / name), "demo", f"data/{name}")
        sources = ("data.source=s3://demo/data/train.jsonl", "data.eval_source=s3://demo/data/heldout.jsonl")
        there = run_there(tmp_path / "there", ray, *sources)
        assert list(Path(ray).glob("ray/session_*/logs/worker-*")), "nothing was done by a worker of Ray's"
        monkeypatch.setenv("SFT_HOME", str(tmp_path / "there"))
        assert find_digests(there) == expected
        check_rows(client, there)
    assert (there.dataset, there.tokens) == (here.dataset, here.tokens)
    assert there.dataset.rows_in == 1103
