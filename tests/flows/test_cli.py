"""The command line says what it takes, and what a dataset would become."""

import html
import json
import os
import pty
import re
import shutil
import subprocess
import sys
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
    assert re.search(r"assistant\W+⟦The number \d+\.<\|im_end\|>⟧", result.output)  # readable without colours
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


def test_check_without_the_demo_s_model_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.console._DEMO_MODEL", tmp_path / "demo")  # as where a wheel was installed
    result = _runner.invoke(app, ["check", "rows.jsonl"])
    assert result.exit_code == 1
    assert "no model is named: give --config, or --set model.base_model=NAME" in result.stderr.replace("\n", " ")


def test_check_of_a_missing_file_says_so(tmp_path: Path) -> None:
    result = _runner.invoke(app, ["check", str(tmp_path / "nowhere.jsonl")])
    assert result.exit_code == 1
    assert "nowhere.jsonl" in result.output


# Three quarters of the rows are refused by the template, and none by ingestion.
_STRICT = (
    "{% for m in messages %}{% if 'odd' in m.content %}{{ raise_exception('odd words are not said') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _write_odd(tmp_path: Path) -> tuple[Path, Path]:
    rows = [{"prompt": f"Say {n}{'' if n % 4 == 0 else ' odd'}.", "completion": f"It is {n}."} for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "strict.jinja").write_text(_STRICT)
    return tmp_path / "rows.jsonl", tmp_path / "strict.jinja"


def test_rows_that_tokenization_refuses_count_in_the_budget_of_check(tmp_path: Path) -> None:
    rows, template = _write_odd(tmp_path)
    report = tmp_path / "check.json"
    options = ["--set", f"model.chat_template={template}", "--json", str(report)]
    result = _runner.invoke(app, ["check", str(rows), *options])
    assert result.exit_code == 1
    assert "not fit to train" in result.output
    found = json.loads(report.read_text())
    assert "150 of 200 rows (75.00%) are rejected" in found["problems"][0]
    assert "150 x template_error, the first: rows.jsonl:2" in found["problems"][0]
    assert "odd words are not said" in found["problems"][0]
    assert found["rows"]["rows in"] == sum(number for name, number in found["rows"].items() if name != "rows in")
    allowed = _runner.invoke(app, ["check", str(rows), *options[:2], "--set", "data.max_rejected_fraction=0.75"])
    assert allowed.exit_code == 0, allowed.output
    told = " ".join(allowed.output.partition("template_error (150)")[2].split())
    assert told.count("set model.chat_template to a template that takes it, such as chatml") == 1


def test_check_takes_the_length_that_the_model_has_positions_for(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[2] / "deploy" / "demo" / "base_model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    rows = [{"prompt": f"Say {n}.", "completion": f"{n} " * 40} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, page = tmp_path / "check.json", tmp_path / "new" / "check.html"
    options = ["--set", f"model.base_model={model}", "--json", str(report), "--html", str(page)]
    result = _runner.invoke(app, ["check", str(tmp_path / "rows.jsonl"), *options])
    assert result.exit_code == 1
    found = json.loads(report.read_text())
    assert found["rejected"] == {"answer_too_long": 40}
    assert any("model has positions for 16 tokens" in warning for warning in found["warnings"])
    text = html.unescape(page.read_text(encoding="utf-8"))
    assert all(warning in text for warning in found["warnings"])
    assert found["problems"]
    assert all(problem in text for problem in found["problems"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run", "deploy/configs/demo.yaml"), "Starting"),
        (("check", "deploy/demo/data/train.jsonl"), "Counting rows and tokens"),
    ],
)
def test_the_first_wait_is_not_silent(words: tuple[str, ...], told: str) -> None:
    seen, shown = pty.openpty()
    command = [sys.executable, "-m", "flows.cli", *words]
    with subprocess.Popen(command, stdout=shown, stderr=shown, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(shown)
        text = ""
        while told not in text and (found := os.read(seen, 1000)):
            text += found.decode(errors="replace")
        process.kill()
    os.close(seen)
    assert told in text
    assert "Base model" not in text  # the first line of a run
