"""Rules of the house that no linter knows."""

import ast
from collections import defaultdict
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def test_a_class_name_exists_once() -> None:
    places = defaultdict(list)
    for package in ("flows", "tasks", "schemas", "deploy"):
        for file in (_ROOT / package).rglob("*.py"):
            module = ast.parse(file.read_text(encoding="utf-8"))
            # Only those of a module's top level: pandera wants a nested class `Config` in each of its models.
            for node in module.body:
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(str(file.relative_to(_ROOT)))
    assert len(places) > 100
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert not twice
