"""The demo from a bucket through a Ray cluster ends with the adapter of the demo from files on this machine's cores."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT
from tests.object_store import serve_bucket

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="the ray extra is not installed"),
]
# Shards and row groups of a dataset of the demo's size, so that there is something to spread.
PROGRAM = """
import sys
from flows.session import prepare_session
prepare_session()
from tasks.ingestion import tables
from tasks.ingestion import task as ingestion
from tasks.tokenization import shards
ingestion.SHARD_BYTES, tables.GROUP_ROWS, shards.FEWEST_ROWS_PER_SHARD = 20_000, 200, 200
from flows.cli import main
main()
"""
_PATIENCE = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600"}
SETTINGS = (
    *("training.num_epochs=1", "evaluation.max_examples=20", "evaluation.max_new_tokens=8"),
    *("evaluation.questions=[]", "evaluation.probes=[]", "registry.gate.min_gain=0.0"),
)


def run(folder: Path, *settings: str, **variables: str) -> tuple[str, dict[str, int]]:
    """Run the demo in a home of its own, and return the adapter's digest and where the rows went."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SFT_"))}
    environment = {**kept, "SFT_HOME": str(folder), "PYTHONPATH": str(ROOT), **_PATIENCE, **variables}
    options = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    report = folder.with_suffix(".json")
    command = ["run", "deploy/configs/demo.yaml", *options, "--report", str(report)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    (adapter,) = {path.parent for path in folder.rglob("adapter_model.safetensors") if "cache" in path.parts}
    return adapter.name, found["dataset"] | found["tokens"]


def test_the_demo_from_a_bucket_through_ray_has_the_same_adapter(tmp_path: Path) -> None:
    expected = run(tmp_path / "here")
    # A short path: the sockets in it may have a hundred characters.
    with serve_bucket("demo") as client, tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as ray:
        for name in ("train.jsonl", "heldout.jsonl"):
            client.upload_file(str(ROOT / "deploy" / "demo" / "data" / name), "demo", f"data/{name}")
        sources = ("data.source=s3://demo/data/train.jsonl", "data.eval_source=s3://demo/data/heldout.jsonl")
        found = run(tmp_path / "there", *sources, SFT_RAY_ADDRESS="local", RAY_TMPDIR=ray)
        assert list(Path(ray).glob("ray/session_*/logs/worker-*")), "nothing was done by a worker of Ray's"
    assert found == expected
    assert found[1]["rows_in"] == 1103
