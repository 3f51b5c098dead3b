"""A recorded parrot."""

import json
from pathlib import Path

import polars as pl
import pytest

from schemas.proofs import ServingProbes
from tasks.proving.recording import make_probes
from tests.tasks.serving.conftest import parrot  # noqa: F401  (a fixture)
from tests.tasks.serving.parrot import BASE_MODEL, CONVERSATIONS


@pytest.fixture(scope="session")
def probes(parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> ServingProbes:  # noqa: F811
    """What the parrot and its base answer; the folders of tests that take this fixture share it."""
    kept = tmp_path_factory.getbasetemp() / "probes.json"
    if kept.is_file():
        return ServingProbes.model_validate_json(kept.read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("dataset")
    rows = [
        {
            "messages": json.dumps([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]),
            "tools": json.dumps(tools) if tools else None,
        }
        for asked, tools, answer in CONVERSATIONS
    ]
    schema = {"messages": pl.String, "tools": pl.String}
    pl.DataFrame(rows, schema=schema).write_parquet(folder / "eval.parquet")
    made = make_probes(BASE_MODEL, parrot, folder)
    kept.write_text(made.model_dump_json(), encoding="utf-8")
    return made
