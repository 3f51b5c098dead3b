"""Figures of the report: as PNG files, and as SVG that takes the colours of the page it stands in.

Figures are made without pyplot, which would keep each one open and choose a window system.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tasks.evaluation.champion import Rival
from tasks.evaluation.comparison import Comparison
from tasks.evaluation.metrics import METRICS

BEFORE, AFTER, CHAMPION = "#8c95a4", "#2f7de1", "#d08b1d"
"""Base and fine-tuned model, champion; readable on white and on near black."""
_INK, _PAGE_INK = "#1c2430", "#010203"
"""Colour of text and axes: in files, and the mark that the page's own colour takes the place of."""
MAX_VECTOR_POINTS = 2000
"""More points than this are drawn as an image within the SVG, which would be too large otherwise."""
STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
}

Curve = tuple[int, float, float | None]
"""Step, training loss, evaluation loss where there was one."""
Side = tuple[str, str, dict[str, float], dict[str, tuple[float, float]]]
"""Label, colour, value and interval by metric."""
Draw = Callable[[str], Figure]
"""Draws a figure with the given ink."""


def draw_figures(comparison: Comparison, curves: Sequence[Curve] | None, rival: Rival | None = None) -> dict[str, Draw]:
    """Return what draws each figure, by name: metrics and nll where rows were held out, training with curves."""
    figures: dict[str, Draw] = {}
    if comparison.num_examples:
        figures["metrics"] = lambda ink: draw_metrics(comparison, ink, rival)
        figures["nll"] = lambda ink: draw_row_nll(comparison, ink)
    if curves:
        figures["training"] = lambda ink: draw_training(curves, ink)
    return figures


def save_png(draw: Draw, path: Path) -> None:
    """Write a figure on white as PNG."""
    with mpl.rc_context(STYLE):
        draw(_INK).savefig(path, format="png", dpi=144, facecolor="white")


def render_svg(draw: Draw) -> str:
    """Return a figure as an SVG element without background, its ink the CSS variable --ink."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        draw(_PAGE_INK).savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_PAGE_INK, "var(--ink)")


def draw_metrics(comparison: Comparison, ink: str, rival: Rival | None = None) -> Figure:
    """Draw bars of each measure for each model, with intervals."""
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    shares, surprise = figure.subplots(1, 2, width_ratios=[4, 1.35])
    sides = _list_sides(comparison, rival)
    measured = {name: METRICS[name] for name in METRICS if name in comparison.delta}
    of_hundred = {name: metric for name, metric in measured.items() if metric.form in ("percent", "points")}
    scales = {name: 100 if metric.form == "percent" else 1 for name, metric in of_hundred.items()}
    _draw_bars(shares, sides, scales, [_break_label(metric.label) for metric in of_hundred.values()], ink)
    shares.set_ylim(0, 104)
    shares.set_ylabel("%")
    _draw_bars(surprise, sides, {"nll": 1}, ["Surprise (nll),\nless is better"], ink)
    surprise.set_ylabel("nats a token")
    surprise.set_xlim(-0.75, 0.75)
    for axes in (shares, surprise):
        _dress(axes, ink)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, labelcolor=ink)
    return figure


def _break_label(label: str) -> str:
    """Write a label on two lines: before the parenthesis or the last word."""
    before, space, last = label.partition(" (") if " (" in label else label.rpartition(" ")
    return f"{before}\n{space.strip()}{last}" if space else label


def _list_sides(comparison: Comparison, rival: Rival | None) -> list[Side]:
    """Return base model, champion where it was compared, and fine-tuned model."""
    sides = [("Base model", BEFORE, comparison.before, comparison.before_interval)]
    if rival is not None and rival.comparison is not None:
        name = f"Champion (version {rival.report.version})"
        sides.append((name, CHAMPION, rival.comparison.before, rival.comparison.before_interval))
    return [*sides, ("Fine-tuned model", AFTER, comparison.after, comparison.after_interval)]


def _draw_bars(axes: Any, sides: Sequence[Side], scales: dict[str, int], labels: list[str], ink: str) -> None:
    """Draw a bar of each side for each metric, times its scale."""
    width = 0.72 / len(sides)
    for number, (label, colour, values, intervals) in enumerate(sides):
        shift = (number - (len(sides) - 1) / 2) * width
        heights = [values[name] * scale for name, scale in scales.items()]
        below = [(values[name] - intervals[name][0]) * scale for name, scale in scales.items()]
        above = [(intervals[name][1] - values[name]) * scale for name, scale in scales.items()]
        places = [at + shift for at in range(len(scales))]
        axes.bar(places, heights, width * 0.94, color=colour, label=label)
        axes.errorbar(places, heights, yerr=[below, above], fmt="none", ecolor=ink, elinewidth=1.2, capsize=3)
    axes.set_xticks(range(len(scales)), labels)
    axes.tick_params(axis="x", length=0)


def draw_row_nll(comparison: Comparison, ink: str) -> Figure:
    """Draw each row's nll a token before against after; below the line the model has learned."""
    figure = Figure(figsize=(4.5, 4.1), layout="constrained")
    axes = figure.subplots()
    before, after = (comparison.table[f"nll_{side}"].to_numpy() for side in ("before", "after"))
    end = 1.05 * max(float(before.max()), float(after.max()), 0.1)
    axes.plot([0, end], [0, end], color=BEFORE, linewidth=1.2, linestyle=(0, (4, 3)))
    many = len(before) > MAX_VECTOR_POINTS
    axes.scatter(before, after, s=6 if many else 16, color=AFTER, alpha=0.55, linewidths=0, rasterized=many)
    axes.set_xlim(0, end)
    axes.set_ylim(0, end)
    axes.set_xlabel("base model (nats a token)")
    axes.set_ylabel("fine-tuned model (nats a token)")
    _dress(axes, ink)
    return figure


def draw_training(curves: Sequence[Curve], ink: str) -> Figure:
    """Draw training and evaluation loss over the steps."""
    figure = Figure(figsize=(4.5, 4.1), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [step for step, _, _ in curves],
        [loss for _, loss, _ in curves],
        color=BEFORE,
        linewidth=1.3,
        label="training rows",
    )
    held_out = [(step, loss) for step, _, loss in curves if loss is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=AFTER, linewidth=1.8, marker="o", markersize=4, label="held out")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    _dress(axes, ink)
    axes.legend(frameon=False, labelcolor=ink)
    return figure


def _dress(axes: Any, ink: str) -> None:
    """Give the axes their ink and take away what is not read."""
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(ink)
        spine.set_linewidth(0.6)
    axes.tick_params(colors=ink, width=0.6)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(ink)
    axes.grid(axis="y", color=BEFORE, alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)
