"""What `sft check` shows: the verdict, where every row went, lengths, and examples with the trained text in colour."""

from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flows.checking import Check
from flows.console import escape
from tasks.visible_text import make_visible

_NUM_SHOWN = 3
_MAX_CELL_CHARS = 120
_MAX_RUN_CHARS = 600
_BAR_WIDTH = 24
_BEGIN, _END = "⟦", "⟧"
"""Around what is trained: without colours, as in a file, it is told apart by them."""


def show_check(check: Check, source: str) -> None:
    """Print the verdict, where every row went, lengths, and three examples with the trained text in colour."""
    console = Console(highlight=False)
    good = not check.problems
    verdict = "[bold green]ready to train[/]" if good else "[bold red]not fit to train[/]"
    console.print(Panel(f"{verdict}  {escape(source)}", expand=False))
    for problem in check.problems:
        console.print(f"[red]✗[/] {escape(problem)}")
    console.print(_rows_table(check))
    for reason, places in check.places.items():
        console.print(f"[yellow]{reason}[/] ({check.rejected[reason]:,})")
        for number, place in enumerate(places):  # the first one whole: the way out stands at its end
            shown = shorten(place) if number else " ".join(place.split())
            console.print(f"  {escape(shown)}", style="dim")
    console.print(_lengths_table(check.masks))
    console.print(_remarks_table(check), "")
    rejected = check.masks.get("rejected_samples", ())
    for number, runs in enumerate(check.masks["samples"][:_NUM_SHOWN], start=1):
        of_pair = rejected[number - 1 : number]
        for name, shown in zip((", chosen" if of_pair else "", ", rejected"), (runs, *of_pair), strict=False):
            title = f"example {number}{name}: [green]{_BEGIN}trained{_END}[/], [dim]not trained[/]"
            console.print(Panel(_mark_trained(shown), title=title, title_align="left", border_style="bright_black"))


def _rows_table(check: Check) -> Table:
    table = Table(title="\nWhere every row went", title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_column(justify="right")
    total = check.rows["rows in"]
    for name, number in check.rows.items():
        share = f"{number / total:.1%}" if total else ""
        share = "< 0.1%" if share == "0.0%" and number else share
        style = None if number else "dim"
        table.add_row(name, f"{number:,}", share, style=style, end_section=name == "rows in")
    return table


def _remarks_table(check: Check) -> Table:
    """List what to look at and what was chosen, later lines of each below its first."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column()
    for warning in check.warnings:
        table.add_row("[yellow]![/]", escape(warning))
    for note in check.notes:
        table.add_row("[dim]·[/]", Text(make_visible(note), style="dim"))
    return table


def _lengths_table(masks: dict[str, Any]) -> Table:
    """Show how long the examples are, and how much of them is trained."""
    total, trained = masks["tokens_per_example"], masks["trained_tokens_per_example"]
    share = f"{masks['share_trained']:.0%} of {masks['total_tokens']:,} tokens are trained"
    ending = f"{masks['share_ending_in_end_of_turn']:.0%} of the examples end in an end-of-turn token"
    table = Table(title="Tokens an example", caption=f"{share}; {ending}\n", box=box.SIMPLE)
    table.title_justify = table.caption_justify = "left"
    for column in ("tokens", "examples", "", "of them trained", ""):
        table.add_column(column, justify="right" if column else "left")
    most = max([1, *total["counts"].values(), *trained["counts"].values()])
    spans = sorted({*total["counts"], *trained["counts"]}, key=lambda span: int(span.split("-")[0]))
    for span in spans:
        cells = [span]
        for counts, colour in ((total["counts"], "blue"), (trained["counts"], "green")):
            number = counts.get(span, 0)
            cells += [f"{number:,}" if number else "", f"[{colour}]{_draw_bar(number / most)}[/]"]
        table.add_row(*cells)
    return table


def _draw_bar(share: float) -> str:
    """Draw a share of the longest bar in eighths of a character; what is there at all shows."""
    eighths = max(round(8 * _BAR_WIDTH * share), 1 if share else 0)
    return "█" * (eighths // 8) + "▏▎▍▌▋▊▉"[eighths % 8 - 1 : eighths % 8]


def _mark_trained(runs: list[dict[str, Any]]) -> Text:
    """Return an example's text, trained parts green and between marks, long parts shortened in the middle."""
    text = Text()
    for run in runs:
        shown = run["text"]
        if len(shown) > _MAX_RUN_CHARS:
            shown = f"{shown[: _MAX_RUN_CHARS // 2]} […] {shown[-_MAX_RUN_CHARS // 2 :]}"
        shown = make_visible(shown)
        if run["trained"]:
            text.append(f"{_BEGIN}{shown}{_END}", style="green")
        else:
            text.append(shown, style="dim")
    return text


def shorten(text: str) -> str:
    """Return a text as one line that fits a cell."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CELL_CHARS else line[: _MAX_CELL_CHARS - 1] + "…"
