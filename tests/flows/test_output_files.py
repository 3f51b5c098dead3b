"""Odd names and files that cannot be written are told before the work, in words."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from schemas.loading import load_config, quote_text
from tasks import tracking

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "deploy" / "demo" / "base_model")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"Say {n}.", "completion": f"{n} it is."}) for n in range(40)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize(
    "options",
    [
        ("init", "ROWS", MODEL, "--output", "FILE"),
        ("check", "ROWS", "--json", "FILE"),
        ("check", "ROWS", "--html", "FILE"),
        ("evaluate", MODEL, "ROWS", "--json", "FILE"),
        ("evaluate", MODEL, "ROWS", "--answers", "FILE"),
        ("run", str(ROOT / "deploy" / "configs" / "demo.yaml"), "--report", "FILE"),
    ],
    ids=lambda options: f"{options[0]} {options[-2]}",
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(rows: Path, options: tuple[str, ...]) -> None:
    for file in (rows / "below-a-file.json", rows.parent, Path("/proc/nothing/there.json")):
        if options[0] == "init" and file == rows.parent:
            continue  # it is there already
        given = [str(rows) if word == "ROWS" else str(file) if word == "FILE" else word for word in options]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit), done.exception
        assert "cannot be written" in done.output
        assert options[-2].lstrip("-") in done.output


def test_a_file_that_can_be_written_is_left_as_it_is_until_then(rows: Path) -> None:
    report = rows.parent / "new" / "report.json"
    done = CliRunner().invoke(app, ["check", str(rows.parent / "nothing.jsonl"), "--json", str(report)])
    assert done.exit_code == 1
    assert not report.exists()
    report.write_text("old")
    CliRunner().invoke(app, ["check", str(rows.parent / "nothing.jsonl"), "--json", str(report)])
    assert report.read_text() == "old"


@pytest.mark.parametrize(
    "text", ["new\nline", "esc\x1b]0;t\x07", "é🎉", "a: b # c", "\x7f\x85\u2028", '"', "\\", "{{x}}", "- a"]
)
def test_any_text_is_quoted_for_yaml(text: str) -> None:
    assert yaml.safe_load(f"a: {quote_text(text)} # comment") == {"a": text}
    assert "\n" not in quote_text(text)


@pytest.mark.parametrize("name", ["new\nline.jsonl", "esc\x1b]0;t\x07.jsonl", "é🎉.jsonl"])
def test_a_config_is_made_for_data_of_any_name(rows: Path, name: str) -> None:
    data = rows.rename(rows.parent / name)
    done = CliRunner().invoke(app, ["init", str(data), MODEL, "--output", str(rows.parent / "my.yaml")])
    assert done.exit_code == 0, done.output
    assert load_config(rows.parent / "my.yaml").data.source == str(data)
    assert "\x1b]" not in (rows.parent / "my.yaml").read_text()
    checked = CliRunner().invoke(app, ["check", str(data), "--config", str(rows.parent / "my.yaml")])
    assert checked.exit_code == 0, checked.output


def test_models_with_quotation_marks_and_more_than_a_page_of_them_are_listed(rows: Path) -> None:
    client = tracking.client()
    run = client.create_run(tracking.open_experiment("x")).info.run_id
    names = ["it's", 'a"b', *(f"model-{number:03}" for number in range(110))]
    for name in names:
        client.create_registered_model(name)
    for name in (names[0], names[1], names[-1]):
        client.create_model_version(name, "file:///tmp/x", run_id=run, tags={"sft.run": run})
    listed = CliRunner().invoke(app, ["models", "--json"])
    assert listed.exit_code == 0, listed.output
    assert [row["version"] for row in json.loads(listed.output)] == ['a"b/1', "it's/1", "model-109/1"]
    assert CliRunner().invoke(app, ["models", "it's"]).exit_code == 0
