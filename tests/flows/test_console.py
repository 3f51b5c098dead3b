"""What rows and messages say reaches the terminal as text: a terminal never acts on it."""

import importlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flows.cli import app
from tasks.visible_text import make_visible

TITLE, CLIPBOARD, CLEAR, C1 = "\x1b]0;gone\x07", "\x1b]52;c;cm0gLXJm\x07", "\x1b[2J", "\x9b2J"


def test_controls_become_visible_and_lines_stay() -> None:
    assert make_visible(f"a{CLEAR}b\tc\nd\r{C1}") == "a\\x1b[2Jb\tc\nd\\r\\x9b2J"
    assert make_visible("read \u202etxt.exe") == "read \\u202etxt.exe"
    assert make_visible("é 你好 👩‍👧 שלום") == "é 你好 👩‍👧 שלום"


def test_check_shows_escapes_of_rows_and_does_not_send_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    rows = [{"prompt": f"Say {n} {CLEAR}", "completion": f"{CLIPBOARD}{n}", f"x{TITLE}": 1} for n in range(40)]
    bad = {"messages": [{"role": f"who{TITLE}", "content": "x"}]}
    lines = [json.dumps(row) for row in [*rows, {"prompt": CLEAR, "completion": 3}, bad]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "rows.jsonl"), "--set", "data.max_rejected_fraction=1"])
    assert result.exit_code == 0, result.output
    assert "\\x1b[2J" in result.output
    assert "\\x1b]52;c;" in result.output
    assert not {"\x07", "\x1b", "\x9b"} & set(result.output)
    wrong = CliRunner().invoke(app, ["check", f"{tmp_path}/no{CLIPBOARD}.jsonl"])
    assert wrong.exit_code == 1
    assert "\x1b" not in wrong.output


def test_engines_line_of_a_failed_stage_is_not_shown_and_other_warnings_are(tmp_path: Path) -> None:
    import prefect

    from flows.terminal import _is_ours

    engine, own = str(Path(prefect.__file__).parent / "task_engine.py"), str(tmp_path / "task.py")

    def shows(name: str, level: int, path: str, error: Exception | None = None) -> bool:
        info = (type(error), error, None) if error else None
        return _is_ours(logging.LogRecord(name, level, path, 1, "Finished in state Failed('…')", None, info))

    assert shows("prefect.task_runs", logging.INFO, own)
    assert shows("prefect.task_runs", logging.ERROR, own)
    assert not shows("prefect.task_runs", logging.ERROR, engine)
    assert not shows("prefect.flow_runs", logging.INFO, engine)
    assert not shows("prefect.flow_runs", logging.ERROR, engine, ValueError("x"))
    assert not shows("prefect.flow_runs", logging.ERROR, engine)  # after Ctrl-C it tells of a crash
    assert shows("prefect.flow_runs", logging.ERROR, own)
    assert shows("prefect.flow_runs", logging.WARNING, engine)
    assert shows("prefect.events.clients", logging.ERROR, engine)


def test_a_quiet_run_shows_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.terminal import quiet_prefect

    importlib.import_module("prefect.main")  # which makes handlers of its own, once
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    quiet_prefect(only_warnings=True)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        handler.handle(logging.LogRecord("sft", level, "f.py", 1, logging.getLevelName(level), None, None))
    assert [line.split()[-1] for line in lines.getvalue().splitlines()] == ["WARNING", "ERROR"]
    both = CliRunner().invoke(app, ["run", "x.yaml", "--quiet", "--verbose"])
    assert both.exit_code == 1
    assert "--verbose and --quiet" in both.output


def test_log_lines_show_escapes() -> None:
    from flows.terminal import _show_controls

    record = logging.LogRecord("x", logging.WARNING, "f.py", 1, "row %s", (CLEAR,), None)
    assert _show_controls(record)
    assert record.getMessage() == "row \\x1b[2J"


def test_a_model_s_name_is_no_markup_and_no_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.chatting import ChatSession, SamplingConfig, converse

    unused: Any = None
    session = ChatSession(f"a[/b]{CLEAR}[red]c", unused, unused, frozenset(), unused)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # Ctrl-D
    out = io.StringIO()
    converse([session], SamplingConfig(), Console(file=out, width=200))
    assert "a[/b]\\x1b[2J[red]c, greedy" in out.getvalue()
    assert "\x1b" not in out.getvalue()
