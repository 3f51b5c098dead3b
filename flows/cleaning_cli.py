"""The command `sft clean`."""

from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from flows.console import escape, fail, prepare_environment

if TYPE_CHECKING:
    from flows.record_cleaning import Survey

app = typer.Typer()


@app.command()
def clean(
    days: Annotated[
        float, typer.Option(min=0.01, max=36_500, help="Keep what is younger, or was used in so many days.")
    ] = 30,
    runs: Annotated[
        int | None,
        typer.Option(min=1, help="Keep at most the newest N runs of each experiment.", show_default="all young ones"),
    ] = None,
    versions: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Keep the newest N versions of each model, beside those with an alias, former champions and those "
            "tagged sft.keep; older ones go with their runs.",
            show_default="all",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    interrupted: Annotated[
        bool, typer.Option("--interrupted", help="Also old interrupted runs, which then cannot go on.")
    ] = False,
) -> None:
    """Delete what is old: cached folders, kept results, checkpoints, and runs that no registered version needs.

    Runs leave MLflow and Prefect with artifacts, logs and rows. Published datasets, the record of promotions, and what
    a version, a running or an interrupted run needs stay.
    """
    prepare_environment(cache=True)
    from flows.record_cleaning import clean_up, survey

    try:
        found = survey(days=days, runs=runs, versions=versions, interrupted=interrupted)
        freed = None if dry_run else clean_up(found)
    except Exception as error:
        _fail(error)
    _show(found, days, freed)


def _fail(error: Exception) -> NoReturn:
    """Say why it ends; what was deleted until then is gone, and the next cleaning goes on."""
    from flows.troubles import explain_trouble

    if (trouble := explain_trouble(error)) is not None:
        fail(trouble)
    if not isinstance(error, ValueError):
        raise error
    fail(error)


def _show(found: "Survey", days: float, freed: int | None) -> None:
    """Say what was deleted, or would be, item by item then, and what stays.

    Args:
        found: what may go.
        days: that were asked for.
        freed: bytes that databases gave back; None where nothing was deleted.
    """
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(escape(text), soft_wrap=True)

    done = "would be deleted" if freed is None else "deleted"
    for what, sizes in sorted(found.sizes().items()):
        say(f"{what}: {len(sizes):,} {done}, {format_bytes(sum(sizes))}")
    if freed is None:
        for line in found.describe():
            say(f"  {line}")
    elif freed:
        say(f"databases: {format_bytes(freed)} given back")
    if not found.sizes():
        say(f"Nothing that was not used for {days:g} days")
    for line in found.notes():
        say(line)


def format_bytes(number: float) -> str:
    """Return a size for people."""
    return f"{number / 1e6:,.1f} MB"
