"""What ends an answer of a model's folder."""

import json
from pathlib import Path

from tasks.exporting.errors import ExportError


def read_stops(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a generation, by generation_config.json.

    Raises:
        ExportError: there are none.
    """
    file = folder / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    if found is None:
        raise ExportError(f"{file}: names no eos_token_id, so that nothing would end an answer")
    return tuple(found) if isinstance(found, list) else (int(found),)
