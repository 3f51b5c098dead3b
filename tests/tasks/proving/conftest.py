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
    """What the parrot and its base answer."""
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
    return make_probes(BASE_MODEL, parrot, folder)
