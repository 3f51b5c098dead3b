"""Each promise of docs/security.md names a test or a program that holds it, and what it names is there."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
_TESTS = {file.name for file in (ROOT / "tests").rglob("test_*.py")}


def _read_promises() -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in _PAGE.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] != "promise" and not set(row[0]) <= {"-", " "}]


def test_each_promise_names_what_holds_it() -> None:
    promises = _read_promises()
    assert len(promises) >= 20
    assert [row[0] for row in promises if len(row) != 3] == []
    above: str | None = None
    for promise, _, holder in promises:
        if holder.startswith("the same"):
            assert above is not None, promise
        else:
            assert re.search(r"`test_\w+\.py`|`python -m [\w.]+", holder), promise
        above = holder


def test_what_is_named_is_there() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", _PAGE))
    assert len(named) >= 15
    assert named <= _TESTS
    for program in re.findall(r"python -m ([\w.]+)", _PAGE):
        assert importlib.util.find_spec(program) is not None, program
