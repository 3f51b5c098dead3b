"""Commands of `sft` around a run: init before it, runs and models after it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from flows.console import check_files, console, escape, fail, prepare_environment
from schemas.loading import ConfigError

app = typer.Typer()
_JSON = typer.Option("--json", help="Print JSON.")


@app.command()
def init(
    data: Annotated[str, typer.Argument(help="File, folder or hub name of a dataset.")],
    model: Annotated[str, typer.Argument(help="Folder, hub name or registered version (models:/NAME@ALIAS).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, a new one. Default: print it.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="How the rows are read, such as data.columns={prompt: Frage}. Repeatable."),
    ] = None,
) -> None:
    """Write a short commented config for a dataset and a model, from what is found in them."""
    prepare_environment(cache=True)
    if output is not None and output.exists():
        fail(ConfigError(f"{output}: is there already; give another name"))
    check_files(output=output)
    try:
        with console.status("Counting rows and tokens"):
            from flows.first_config import make_config

            made = make_config(data, model, set_ or ())
    except ValueError as error:
        fail(error)
    if output is None:
        typer.echo(made.text, nl=False)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(made.text, encoding="utf-8")
        console.print(f"Wrote {escape(str(output))}. Next: sft run {escape(str(output))}", soft_wrap=True)
    for line in (*made.check.problems, *made.check.warnings):
        console.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)


@app.command()
def runs(
    compared: Annotated[
        list[str] | None, typer.Argument(help="Ids of runs, or their beginnings, to compare.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many of the newest.")] = 20,
    json_: Annotated[bool, _JSON] = False,
) -> None:
    """List the newest runs, or compare some: settings that differ, and metrics."""
    prepare_environment(cache=True)
    from tasks.registry.listing import as_values, compare_runs, list_runs, shorten_id

    try:
        if compared:
            comparison = compare_runs(compared)
            if json_:
                _print_json(vars(comparison))
            else:
                heads = [shorten_id(run) for run in comparison.runs]
                _print_table("Settings that differ", ["setting", *heads], comparison.settings)
                _print_table("Metrics", ["metric", *heads], comparison.metrics)
            return
        rows = list_runs(limit=limit)
    except ValueError as error:
        fail(error)
    if json_:
        _print_json(as_values(rows))
        return
    for row in rows:
        took = "" if row.seconds is None else f"  {row.seconds:,.0f} s"
        outcome = f"  {row.version} {row.verdict}" if row.version else ""
        status = "interrupted" if row.is_interrupted else row.status.lower()
        _print_entry(f"{shorten_id(row.run)}  {row.started}  {status}{took}{outcome}", row.name)
        if row.failure:
            _console().print(Padding(escape(row.failure), (0, 0, 0, 4)))
    if not rows:
        _console().print("There are no runs yet.")


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Registered model. Default: all.", show_default=False)] = None,
    json_: Annotated[bool, _JSON] = False,
) -> None:
    """List registered versions with their aliases, and why the gate let each pass or refused it."""
    prepare_environment(cache=True)
    from tasks.registry.listing import as_values, list_versions, shorten_id

    try:
        rows = list_versions(name)
    except ValueError as error:
        fail(error)
    if json_:
        _print_json(as_values(rows))
        return
    for row in rows:
        aliases = f"  {row.aliases}" if row.aliases else ""
        head = f"{row.version}{aliases}  {row.registered}  from {row.base_model}, run {shorten_id(row.run)}"
        _print_entry(head, f"{row.verdict}: {row.reasons}" if row.reasons else row.verdict)
    if not rows:
        _console().print("There are no versions yet.")


def _print_entry(head: str, text: str) -> None:
    console = _console()
    console.print(f"[bold]{escape(head)}[/]", soft_wrap=True)
    console.print(Padding(escape(text), (0, 0, 0, 4)))


def _console() -> Console:
    return Console(highlight=False)


def _print_table(title: str, columns: list[str], rows: dict[str, tuple[Any, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for name, values in rows.items():
        cells = ["" if value is None else f"{value:.5g}" if isinstance(value, float) else value for value in values]
        table.add_row(escape(name), *map(escape, cells))
    _console().print(table if rows else f"{title}: none.")


def _print_json(values: Any) -> None:
    typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
