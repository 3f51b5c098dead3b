import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MATERIAL = Path(__file__).resolve().parents[3] / ".." / "shared" / "material" / "datasets"


@pytest.fixture
def material() -> Path:
    """Datasets that nobody here wrote; not everybody has them."""
    if not MATERIAL.is_dir():
        pytest.skip("the test material is not here")
    return MATERIAL


WriteLines = Callable[[str, list[Any]], Path]


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    """Write values as JSONL; a string is written as the line that it is."""

    def write(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
