"""The table of what three tutorials do: its sums are right, and each row names a test that is there."""

import re
from collections import Counter

from tests.docs.commands import ROOT

_TEXT = (ROOT / "docs" / "tutorials-table.md").read_text(encoding="utf-8")
_ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in _TEXT.splitlines()
    if re.match(r"\| \d+ \|", line)
]


def test_there_are_94_rows_and_the_sums_are_those_of_the_rows() -> None:
    assert [int(row[0]) for row in _ROWS] == list(range(1, 95))
    assert {len(row) for row in _ROWS} == {5}
    said = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \|$", _TEXT, re.MULTILINE))
    counted = Counter(row[3] for row in _ROWS)
    assert {name: int(number) for name, number in said.items() if int(number)} == {**counted, "all": 94}


def test_each_row_is_held_by_a_test_that_is_there() -> None:
    for number, _, _, how, test in _ROWS:
        if how == "missing":
            continue
        link = re.fullmatch(r"\[([^]]+)\]\(\.\./(tests/[^)]+)\)", test)
        assert link is not None, f"row {number}: {test}"
        name = link[1].replace(" ", "_")
        assert f"def test_{name}(" in (ROOT / link[2]).read_text(encoding="utf-8"), f"row {number}: {test}"


def test_what_is_refused_says_why() -> None:
    (refused,) = [row for row in _ROWS if row[3] == "refused"]
    assert refused[1] == "`trust_remote_code=True`"
    assert "could do anything on the machine" in refused[2]
