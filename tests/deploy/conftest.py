"""The demo's generated text and shipped rows, made once for this folder's tests."""

import json
from pathlib import Path

import pytest

from deploy.demo.corpus import make_documents

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo() -> Path:
    return ROOT / "deploy" / "demo"


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents()


@pytest.fixture(scope="session")
def train_rows(demo: Path) -> list[dict[str, str]]:
    return _read(demo / "data" / "train.jsonl")


@pytest.fixture(scope="session")
def held_out_rows(demo: Path) -> list[dict[str, str]]:
    return _read(demo / "data" / "heldout.jsonl")


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
