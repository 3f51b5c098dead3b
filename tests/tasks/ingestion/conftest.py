import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from tasks.ingestion.pieces import write_piece
from tasks.ingestion.rows.identity import UsableRow
from tasks.ingestion.splitting.index import Index, Piece

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


def write_index(folder: Path, *datasets: Sequence[UsableRow], rows_per_piece: int = 1000, seed: int = 0) -> Index:
    """Write the pieces of some datasets, as the shards' readers do, and return the index of their rows."""
    pieces: list[Piece] = []
    for rows in datasets:
        for start in range(0, len(rows), rows_per_piece):
            some = rows[start : start + rows_per_piece]
            first = pieces[-1].start + pieces[-1].num_rows if pieces else 0
            write_piece(folder, len(pieces), some, [])
            pieces.append(Piece(folder, len(pieces), first, len(some), None))
    return Index(pieces, list(accumulate(map(len, datasets), initial=0)), seed)
