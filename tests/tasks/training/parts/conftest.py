"""Small windows, and a bucket with the parts of a table."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tasks.training import order
from tests.object_store import Traffic, serve_bucket
from tests.tasks.training.parts.token_parts import BUCKET, GROUPS_PER_WINDOW, Stored, store_parts, write_parts


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "GROUPS_PER_WINDOW", GROUPS_PER_WINDOW)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    """A tokens folder whose parts are in a bucket only."""
    tokens, traffic = write_parts(tmp_path / "stored"), Traffic(r"GET /\S*?(\d{6}\.parquet)")
    with serve_bucket(BUCKET, traffic.watch) as client:
        yield store_parts(tokens, client, traffic)
