"""The page that a person reads: one HTML file without anything from outside, and its figures as files beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
from jinja2 import Environment
from markupsafe import Markup

from schemas.artifacts import Decision, Delta, ProbeReport
from tasks.evaluation.champion import Rival, add_answers
from tasks.evaluation.comparison import Comparison
from tasks.evaluation.metrics import METRICS
from tasks.evaluation.plots import Curve, draw_figures, render_svg, save_png
from tasks.evaluation.verdict import (
    describe_rival,
    format_change,
    format_value,
    judge,
    list_caveats,
    state_verdict,
)
from tasks.pages import open_templates

ROWS_SHOWN = 6
"""Rows shown of each outcome."""
MAX_TEXT = 1200
"""Characters of a text shown; table.parquet has all of it."""
TILES = ("reward_accuracy", "preference_loss", "exact_match", "rouge_l", "nll")
"""Measures shown large, the first of those that there are."""
NUM_TILES = 3
READINGS = {
    "better": "better",
    "worse": "worse",
    "unclear": "no clear change",
    "changed": "changed",
}
FIGURE_TEXTS = {
    "metrics": (
        "Before and after",
        "Thin lines are the intervals in which each value would lie with other rows of the same kind.",
    ),
    "nll": ("Surprise, row by row", "A dot is a held-out row. Below the dashed line the fine-tuned model does better."),
    "training": (
        "Training",
        "The held-out line should fall with the other one; when it turns up, rows are learned by heart.",
    ),
}


@dataclass(frozen=True)
class MetricRow:
    """A line of the table of measures, as text."""

    label: str
    meaning: str
    before: str
    after: str
    change: str
    interval: str
    direction: str
    reading: str
    champion: str = ""
    """Value of the champion, where it was compared."""
    champion_change: str = ""
    champion_interval: str = ""
    champion_direction: str = ""
    champion_reading: str = ""


@dataclass(frozen=True)
class OutcomeGroup:
    """Rows of one outcome: how many, their part of all, and those that are shown."""

    name: str
    count: int
    percent: float
    rows: list[dict[str, object]]
    explanation: str


def write_report(
    folder: Path,
    comparison: Comparison,
    *,
    title: str,
    questions: Sequence[tuple[str, str, str]] = (),
    facts: dict[str, dict[str, str]] | None = None,
    warnings: Sequence[str] = (),
    curves: Sequence[Curve] | None = None,
    rival: Rival | None = None,
    decision: Decision | None = None,
    probes: Sequence[ProbeReport] = (),
) -> Path:
    """Write report.html and plots/*.png into a folder, which is made where it is missing.

    Every text is escaped: what a model or a dataset says cannot become markup.

    Args:
        folder: where to write.
        comparison: base against fine-tuned model.
        title: heading of the page.
        questions: free questions as (question, base model's answer, fine-tuned model's answer).
        facts: sections of key and value, such as the accounting of the rows.
        warnings: what a person should know, a sentence each; those of `list_caveats` are added.
        curves: (step, training loss, evaluation loss or None), in order.
        rival: the champion, when there is one.
        decision: of the gate.
        probes: further held-out sets.

    Returns:
        The path of report.html.
    """
    figures = draw_figures(comparison, curves, rival)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        save_png(draw, folder / "plots" / f"{name}.png")
    tone, sentence = state_verdict(comparison)
    page = _environment().get_template("report.html.jinja")
    html = page.render(
        title=title,
        tone=tone,
        verdict=sentence,
        num_examples=comparison.num_examples,
        confidence=f"{100 * comparison.confidence:g} %",
        metrics={name: describe_metric(comparison, name, rival) for name in comparison.delta},
        champion=rival.report if rival else None,
        against_champion=describe_rival(rival) if rival else "",
        tiles=[name for name in TILES if name in comparison.delta][:NUM_TILES],
        decision=decision,
        probes=[describe_probe(probe) for probe in probes],
        warnings=list(dict.fromkeys((*warnings, *list_caveats(comparison)))),
        # The SVG is drawn from numbers and fixed words only, so it may enter unescaped.
        figures={name: (*FIGURE_TEXTS[name], Markup(render_svg(draw))) for name, draw in figures.items()},
        groups=group_rows(add_answers(comparison.table, rival)),
        questions=questions,
        facts=facts or {},
    )
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8", errors="backslashreplace")
    return path


def _environment() -> Environment:
    environment = open_templates(Path(__file__).parent)
    environment.filters["clip"] = clip_text
    return environment


def clip_text(text: str) -> str:
    """Cut a long text and say how long it was."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text):,} characters)"


def describe_metric(comparison: Comparison, name: str, rival: Rival | None = None) -> MetricRow:
    """Write one measure's values and changes as text."""
    delta, measure = comparison.delta[name], METRICS[name]
    direction = judge(name, delta)
    row = MetricRow(
        label=measure.label,
        meaning=measure.meaning,
        before=format_value(name, comparison.before[name]),
        after=format_value(name, comparison.after[name]),
        change=format_change(name, delta.value),
        interval=_describe_interval(name, delta),
        direction=direction,
        reading=READINGS[direction],
    )
    if rival is None or rival.comparison is None:
        return row
    delta = rival.report.delta[name]
    direction = judge(name, delta)
    return replace(
        row,
        champion=format_value(name, rival.report.metrics[name]),
        champion_change=format_change(name, delta.value),
        champion_interval=_describe_interval(name, delta),
        champion_direction=direction,
        champion_reading=READINGS[direction],
    )


def describe_probe(probe: ProbeReport) -> MetricRow:
    """Write a probe's measure as text; its name is the label."""
    direction = judge(probe.metric, probe.delta)
    return MetricRow(
        label=probe.name,
        meaning=f"{METRICS[probe.metric].label}, {probe.num_conversations:,} conversations. A loss of up to "
        f"{probe.max_loss:g} is tolerated.",
        before=format_value(probe.metric, probe.before),
        after=format_value(probe.metric, probe.after),
        change=format_change(probe.metric, probe.delta.value),
        interval=_describe_interval(probe.metric, probe.delta),
        direction=direction,
        reading=READINGS[direction],
    )


def _describe_interval(name: str, delta: Delta) -> str:
    return f"{format_change(name, delta.ci_low)} to {format_change(name, delta.ci_high)}".replace(" points to", " to")


def group_rows(table: pl.DataFrame) -> list[OutcomeGroup]:
    """Count the rows of each outcome and choose those to show.

    Of the worsened ones the worst are shown first. Of the others it is those with the smallest example_id: a digest,
    so this is a draw that nobody chose, and the same one each time.
    """
    right = pl.col("exact_match_before") * pl.col("exact_match_after")
    num_right = int(table.filter(pl.col("outcome") == "unchanged").select(right.sum()).item())
    explanations = {
        "improved": "Now an exact match, or clearly closer to the expected answer (chrF higher by more than 1).",
        "worsened": "No longer an exact match, or clearly further away (chrF lower by more than 1). The worst first.",
        "unchanged": f"As close as before. Both models are word-for-word right in {num_right:,} of them.",
    }
    groups = []
    for name, explanation in explanations.items():
        rows = table.filter(pl.col("outcome") == name)
        order = pl.col("chrf_after") - pl.col("chrf_before") if name == "worsened" else pl.col("example_id")
        shown = rows.sort(order, maintain_order=True).head(ROWS_SHOWN)
        percent = 100 * rows.height / max(1, table.height)
        groups.append(OutcomeGroup(name, rows.height, percent, shown.to_dicts(), explanation))
    return groups
