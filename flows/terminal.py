"""What a person sees in the terminal: log lines of the stages, and the outcome as tables."""

import importlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import prefect
from rich.console import Console
from rich.table import Table

from flows.check_tables import shorten
from flows.console import escape
from flows.environment import DATABASE_VARIABLE, run_defaults
from schemas.artifacts import ComparisonReport, Delta, RunReport, SweepReport
from schemas.plurals import add_up_rows, count_of
from tasks import storage, tracking
from tasks.evaluation.verdict import judge
from tasks.sqlite_files import find_path, make_address
from tasks.visible_text import make_visible

if TYPE_CHECKING:
    from flows.evaluating import Evaluated

_PREFECT_FOLDER = str(Path(prefect.__file__).parent)
_RUNS = ("prefect.task_runs", "prefect.flow_runs")
"""Prefect's loggers of tasks and flows."""
_START_FIELD = 19  # of /proc/self/stat behind the name: when the process started, in ticks after boot
_NUM_SHOWN = 3
_warned: set[str] = set()
"""What the console has shown as a warning."""
_COLOURS = {"better": "green", "worse": "red", "unclear": "dim", "changed": "default"}


def quiet_prefect(*, only_warnings: bool = False) -> None:
    """Keep the stages' own lines on the console and drop the engine's; Prefect's server gets all of them.

    Args:
        only_warnings: of the stages' own lines, keep warnings and errors alone.
    """
    importlib.import_module("prefect.main")  # makes the console's handlers, once, whoever imports it first
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_ours)
        if only_warnings:
            handler.addFilter(_is_warning)
        handler.addFilter(_show_controls)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))


def _is_ours(record: logging.LogRecord) -> bool:
    if not record.pathname.startswith(_PREFECT_FOLDER):
        return True
    # The engine logs what failed or was interrupted with its trace and its state; the command says it itself, once.
    is_failure = record.exc_info is not None or (record.name in _RUNS and record.levelno >= logging.ERROR)
    return record.levelno >= logging.WARNING and not is_failure


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _show_controls(record: logging.LogRecord) -> bool:
    """Make control characters of a message visible; it may hold text of rows."""
    record.msg, record.args = make_visible(record.getMessage()), None
    if _is_warning(record):
        _warned.add(record.msg)
    return True


def write_failure(path: Path, error: Exception) -> None:
    """Write the report of a run that failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"status": "failed", "error": type(error).__name__, "message": str(error)}
    path.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def show_outcome(report: RunReport, *, full_answers: bool = False, only_verdict: bool = False) -> None:
    """Print the comparison, a few answers side by side, the gate's verdict and where to look further.

    Args:
        report: of the run.
        full_answers: do not shorten questions and answers.
        only_verdict: print the verdict with its reasons and the warnings that no log line has shown, and nothing else.
    """
    console = Console(highlight=False)
    if only_verdict:
        unseen = [warning for warning in report.evaluation.warnings if make_visible(warning) not in _warned]
        _show_verdict(console, report, unseen)
        return
    console.print()
    if report.training.sweep is not None:
        console.print(make_candidates_table(report.training.sweep))
        console.print(escape(report.training.sweep.sentence))
    for table in _metrics_tables(report):
        console.print(table)
    comparison = tracking.recall(report.mlflow_run_id, "compare", ComparisonReport)
    if comparison is not None and (answers := _answers_table(tracking.resolve(comparison), full=full_answers)).rows:
        console.print(answers)
    _show_verdict(console, report, report.evaluation.warnings)
    stages = sum(report.durations_seconds.values())
    console.print(f"Took {lived_seconds():.0f} s, {stages:.0f} s of them in the stages. To look further:")
    console.print(f"  MLflow   {_mlflow_command(report.mlflow_run_id)}", soft_wrap=True)
    console.print(f"  Prefect  {_prefect_command(report.prefect_flow_run_id)}", soft_wrap=True)


def _show_verdict(console: Console, report: RunReport, warnings: Sequence[str]) -> None:
    console.print(escape(report.evaluation.sentence))
    entry = report.registry
    colour = "green" if entry.verdict == "promoted" else "yellow"
    console.print(
        f"[bold]{entry.name} version {entry.version}[/] in the registry: [{colour}]{entry.verdict}[/], "
        f"aliases {', '.join(entry.aliases) or 'none'}"
    )
    for reason in entry.reasons:
        console.print(f"  {escape(reason)}")
    for check in report.evaluation.checks:
        if check.kind == "probe" and check.passed:  # those that did not pass are among the reasons
            console.print(f"  {escape(check.finding)}", style="dim")
    for warning in warnings:
        console.print(f"  [yellow]warning:[/] {escape(warning)}")


def lived_seconds() -> float:
    """Return how long this process has been running, whatever was done to the clock meanwhile."""
    after_name = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    started = int(after_name[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def show_evaluated(found: "Evaluated") -> None:
    """Print where every row went, and the metrics of a model, beside its base's where they were compared."""
    console = Console(highlight=False)
    rows_in = count_of(found.rows["rows in"], "row")
    console.print(f"{rows_in} in = {add_up_rows(found.rows)}", markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
    if found.warning:
        console.print(f"[yellow]warning:[/] {escape(found.warning)}", soft_wrap=True)
    title = f"{found.target} on {count_of(found.rows['evaluated'], 'row')}"
    if found.base:
        console.print(make_metrics_table(f"{title}, beside {found.base}", "base", found.base_metrics, found.delta))
        return
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in found.metrics.items():
        table.add_row(name, f"{value + 0.0:.4g}")
    console.print(table)


def _metrics_tables(report: RunReport) -> Iterator[Table]:
    """Give the comparison with the base model, and the one with the champion where there is one."""
    evaluation, champion = report.evaluation, report.evaluation.champion
    if not evaluation.num_examples:
        return
    rows = f"on {evaluation.num_examples} held-out rows"
    yield make_metrics_table(f"Base and fine-tuned model {rows}", "base", evaluation.before, evaluation.delta)
    if champion is not None and champion.num_examples:
        rows = f"on {champion.num_examples} held-out rows ({'; '.join(champion.notes)})"
        title = f"Champion (version {champion.version}) and fine-tuned model {rows}"
        yield make_metrics_table(title, "champion", champion.metrics, champion.delta)


def make_candidates_table(sweep: SweepReport) -> Table:
    """Return a table of a sweep's candidates, the one with the smallest held-out loss first."""
    table = Table(title=f"{len(sweep.candidates)} candidates on the held-out rows")
    for column in ("learning rate", "rank", "seed", "loss"):
        table.add_column(column, justify="right")
    for each in sorted(sweep.candidates, key=lambda one: (one.loss is None, one.loss)):
        loss = "given up, " + escape(each.failure) if each.loss is None else f"{each.loss:.4f}"
        style = "bold" if each.name == sweep.winner else "dim" if each.loss is None else None
        table.add_row(f"{each.learning_rate:g}", str(each.rank), str(each.seed), loss, style=style)
    return table


def make_metrics_table(
    title: str, who: str, values: Mapping[str, float], deltas: Mapping[str, Delta], *, other: str = "fine-tuned"
) -> Table:
    """Return a table of a rival's metrics and the changes to another model's, the fine-tuned one's if not said."""
    table = Table(title=title)
    for column in ("metric", who, other, "change", "interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, delta in deltas.items():
        table.add_row(
            name,
            f"{values[name] + 0.0:.4g}",
            f"{values[name] + delta.value + 0.0:.4g}",
            f"[{_COLOURS[judge(name, delta)]}]{delta.change}[/]",
            delta.interval,
        )
    return table


def _answers_table(folder: Path, *, full: bool) -> Table:
    """Show the free questions and the first held-out rows."""
    cell = escape if full else _cell
    table = Table(title="The same questions to both", show_lines=True)
    for column in ("question", "base", "fine-tuned", "reference"):
        table.add_column(column, overflow="fold", ratio=1)
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    for question in questions:
        table.add_row(*map(cell, (question["question"], question["base"], question["tuned"])), "")
    rows = pl.read_parquet(folder / "table.parquet").head(_NUM_SHOWN)
    for row in rows.iter_rows(named=True):
        table.add_row(*(cell(row[name]) for name in ("question", "answer_before", "answer_after", "reference")))
    return table


def _cell(text: str) -> str:
    return escape(shorten(text))


def _script(name: str) -> str:
    return _short(Path(sys.executable).parent / name)


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _mlflow_command(run_id: str) -> str:
    link = tracking.ui_link(run_id)
    if link is not None:
        return link
    uri = tracking.tracking_uri()
    file = find_path(uri)
    if file is not None and file.is_relative_to(Path.cwd()):
        uri = make_address(file.relative_to(Path.cwd()))
    return f"{_script('mlflow')} ui --backend-store-uri {shlex.quote(uri)}   then {tracking.local_link(run_id)}"


def _prefect_command(flow_run_id: str) -> str:
    address = os.environ.get("PREFECT_UI_URL") or os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    if address:
        return f"{address}/runs/flow-run/{flow_run_id}"
    page = f"then http://127.0.0.1:4200/runs/flow-run/{flow_run_id}"
    ours = run_defaults().get(DATABASE_VARIABLE)
    if ours is None or os.environ.get(DATABASE_VARIABLE) != ours:
        return f"{_script('prefect')} server start   {page}"
    home = shlex.quote(_short(storage.home() / "prefect"))  # whose prefect.db is the one
    return f"PREFECT_HOME={home} {_script('prefect')} server start   {page}"
