"""The command line says what it takes, and what a dataset would become."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app

_runner = CliRunner()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))


def _write(tmp_path: Path, num_bad: int) -> Path:
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n}."} for n in range(40)]
    rows += [{"prompt": f"Bad {n}", "completion": " "} for n in range(num_bad)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_help_names_the_commands() -> None:
    output = _runner.invoke(app, ["--help"]).output
    assert "run" in output
    assert "check" in output


def test_check_shows_the_mask_and_passes(tmp_path: Path) -> None:
    report = tmp_path / "out" / "check.json"
    result = _runner.invoke(app, ["check", str(_write(tmp_path, 0)), "--json", str(report)])
    assert result.exit_code == 0, result.output
    assert "ready to train" in result.output
    found = json.loads(report.read_text())
    assert found["ok"] is True
    assert found["rows"] == {
        "rows in": 40,
        "to train": 36,
        "held out": 4,
        "duplicates": 0,
        "leaked": 0,
        "rejected": 0,
    }
    runs = found["masks"]["samples"][0]
    assert [run["trained"] for run in runs] == [False, True]
    assert runs[1]["text"].endswith("<|im_end|>")


def test_check_fails_when_the_budget_is_broken_and_names_the_rows(tmp_path: Path) -> None:
    result = _runner.invoke(app, ["check", str(_write(tmp_path, 5))])
    assert result.exit_code == 1
    assert "not fit to train" in result.output
    assert "5 of 45 rows (11.11%) are rejected" in result.output
    assert "rows.jsonl:41" in result.output


def test_check_fails_on_cut_examples_beyond_the_budget(tmp_path: Path) -> None:
    settings = ["--set", "tokenization.max_length=12"]
    result = _runner.invoke(app, ["check", str(_write(tmp_path, 0)), *settings])
    assert result.exit_code == 1


def test_check_of_a_missing_file_says_so(tmp_path: Path) -> None:
    result = _runner.invoke(app, ["check", str(tmp_path / "nowhere.jsonl")])
    assert result.exit_code == 1
    assert "nowhere.jsonl" in result.output
