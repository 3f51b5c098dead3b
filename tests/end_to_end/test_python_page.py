"""The page about Python is done as a notebook does it: cell after cell, at a prompt, within a running event loop."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import ROOT, find_blocks

pytestmark = pytest.mark.slow

_NOTEBOOK = """
import ast, asyncio, sys

sys.ps1 = ">>> "  # as a kernel or a prompt has it, before anything of ours is imported


async def run_cells(cells):
    space = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell, "cell", "exec"), space)


asyncio.run(run_cells(ast.literal_eval(sys.stdin.read())))
"""


@pytest.fixture(scope="module")
def notebook(command_environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    cells = [
        block.text for block in find_blocks(ROOT / "docs" / "tutorials" / "python.md") if block.language == "python"
    ]
    assert len(cells) == 5
    kept = {name: value for name, value in command_environment.items() if not name.startswith("PREFECT_")}
    quiet = {"TRANSFORMERS_VERBOSITY", "MLFLOW_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"}  # set by the tests, not by people
    return subprocess.run(
        [sys.executable, "-c", _NOTEBOOK],
        cwd=ROOT,
        env={**{name: value for name, value in kept.items() if name not in quiet}, "PYTHONPATH": str(ROOT)},
        input=repr(cells),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_every_cell_works(notebook: "subprocess.CompletedProcess[str]") -> None:
    assert notebook.returncode == 0, notebook.stderr[-3000:]
    assert re.search(r"^promoted \('challenger', 'champion'\)$", notebook.stdout, re.MULTILINE)
    assert "1103 885 {'empty_answer': 3, 'missing_field': 2}" in notebook.stdout
    assert "'role': 'assistant'" in notebook.stdout
    assert notebook.stdout.endswith("Snails.<|im_end|>\n")


def test_it_prints_the_runs_lines_and_nothing_else(notebook: "subprocess.CompletedProcess[str]") -> None:
    lines = notebook.stderr.splitlines()
    assert len(lines) > 15
    assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d  \S", line)] == []
    assert "Step 60: evaluation loss" in notebook.stderr


def test_home_is_where_the_variable_says(notebook: object, command_environment: dict[str, str]) -> None:
    home = Path(command_environment["SFT_HOME"])
    assert (home / "mlflow.db").is_file()
    assert (home / "prefect" / "prefect.db").is_file()
    assert oct(home.stat().st_mode & 0o777) == "0o700"
