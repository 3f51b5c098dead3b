"""A comparison in plain words: whether each measure changed, and the sentence on top of report, terminal and MLflow."""

from collections.abc import Collection
from typing import Literal

from schemas.artifacts import Delta
from schemas.plurals import count_of
from tasks.evaluation.champion import Rival
from tasks.evaluation.comparison import Comparison
from tasks.evaluation.metrics import METRICS, is_derived

FEW_CONVERSATIONS = 30
"""Below this many held-out conversations the report says that intervals are rough; our choice."""

Direction = Literal["better", "worse", "unclear", "changed"]
Tone = Literal["better", "worse", "mixed", "unclear"]


def judge(name: str, delta: Delta) -> Direction:
    """Tell what a difference means; unclear when chance could explain it."""
    if not delta.is_beyond_chance:
        return "unclear"
    metric = METRICS[name]
    if metric.direction == "neither":
        return "changed"
    return "better" if metric.gain(delta.value) > 0 else "worse"


def list_quality(measured: Collection[str]) -> list[str]:
    """Return those of the measured metrics that the verdict goes by, preferences and then the most tangible first."""
    named = [
        name
        for name, metric in METRICS.items()
        if metric.direction != "neither" and not is_derived(name) and name in measured
    ]
    return sorted(named, key=lambda name: METRICS[name].measure is not None)


def state_verdict(comparison: Comparison) -> tuple[Tone, str]:
    """Return the tone and the sentence: better, worse, mixed or unclear, with the most tangible measure."""
    if not comparison.num_examples:
        return (
            "unclear",
            "No row was held out: whether the fine-tuned model is better than the base model is not known.",
        )
    judged = {name: judge(name, comparison.delta[name]) for name in list_quality(comparison.delta)}
    better = [name for name in judged if judged[name] == "better"]
    worse = [name for name in judged if judged[name] == "worse"]
    if better and worse:
        return "mixed", (
            f"The result is mixed: better in {_list_labels(better)}, but worse in {_list_labels(worse)}. "
            f"{_describe(comparison, worse[0])}"
        )
    if better:
        return "better", f"The fine-tuned model is better than the base model. {_describe(comparison, better[0])}"
    if worse:
        return "worse", f"The fine-tuned model is worse than the base model. {_describe(comparison, worse[0])}"
    return "unclear", (
        "No clear difference: chance could explain what was measured on these held-out rows. "
        f"{_describe(comparison, 'exact_match', 'The fine-tuned model')}"
    )


def describe_rival(rival: Rival) -> str:
    """Say in a sentence how the new model stands to the champion."""
    report = rival.report
    who = f"champion (version {report.version})"
    if rival.comparison is None:
        return f"It could not be compared with the {who}: {'; '.join(report.notes)}."
    judged = {name: judge(name, report.delta[name]) for name in list_quality(report.delta)}
    better = [name for name in judged if judged[name] == "better"]
    worse = [name for name in judged if judged[name] == "worse"]
    rows = count_of(report.num_examples, "held-out row")
    if better and worse:
        found = f"it is better in {_list_labels(better)}, but worse in {_list_labels(worse)}"
    elif better or worse:
        found = f"it is {'better' if better else 'worse'} in {_list_labels(better or worse)}"
    else:
        found = "there is no clear difference"
    notes = f" ({'; '.join(report.notes)})" if report.notes else ""
    return f"Against the {who}, on {rows}: {found}{notes}."


def _describe(comparison: Comparison, name: str, subject: str = "It") -> str:
    """Say one measure before and after in a sentence."""
    num_rows = comparison.num_examples
    rows = f"{num_rows:,} held-out question{'s' if num_rows != 1 else ''}"
    before, after = (format_value(name, side[name]) for side in (comparison.before, comparison.after))
    if name == "exact_match":
        num_before, num_after = (round(side[name] * num_rows) for side in (comparison.before, comparison.after))
        return (
            f"{subject} answers {num_after:,} of {rows} word for word ({after}), "
            f"the base model {num_before:,} ({before})."
        )
    return f"{METRICS[name].label} went from {before} to {after} over {rows}."


def _list_labels(names: list[str]) -> str:
    """Name measures in a running sentence."""
    return ", ".join(label[0].lower() + label[1:] for label in (METRICS[name].label for name in names))


def list_caveats(comparison: Comparison) -> list[str]:
    """Return what a reader of the figures should know, a sentence each."""
    caveats: list[str] = []
    if not comparison.num_examples:
        return caveats
    num_conversations = comparison.num_conversations
    if num_conversations == 1:
        caveats.append("There is one held-out conversation only: nothing can be said about chance. Hold out more.")
    elif num_conversations < FEW_CONVERSATIONS:
        caveats.append(
            f"There are only {num_conversations} held-out conversations: the intervals are rough. "
            f"Hold out at least {FEW_CONVERSATIONS}."
        )
    if comparison.delta["repetition_rate"].ci_low > 0:
        before, after = (
            format_value("repetition_rate", side["repetition_rate"]) for side in (comparison.before, comparison.after)
        )
        caveats.append(f"The fine-tuned model repeats itself more than the base model: {after} against {before}.")
    num_empty = comparison.table["answer_after"].str.strip_chars().eq("").sum()
    if num_empty:
        caveats.append(f"The fine-tuned model gave no answer to {num_empty} of {comparison.num_examples} questions.")
    return caveats


def format_value(name: str, value: float) -> str:
    """Write a metric's value for people, with its unit."""
    form = METRICS[name].form
    if form == "percent":
        return f"{100 * value:z.1f} %"
    if form == "nats":
        return f"{value:z.3f}"
    if form == "count":
        return f"{value:z,.2f}" if value < 100 else f"{value:,.0f}"
    return f"{value:z.1f}"


def format_change(name: str, value: float) -> str:
    """Write a difference with its sign; percentages differ by points."""
    form = METRICS[name].form
    text = f"{100 * abs(value):.1f}" if form == "percent" else format_value(name, abs(value))
    # A difference that rounds to nothing has no sign.
    sign = "" if not text.strip("0.,") else "+" if value > 0 else "\N{MINUS SIGN}"
    return sign + text + (" points" if form == "percent" else "")
