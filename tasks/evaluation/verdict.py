"""A comparison in plain words: what each measure means, whether it changed, and the sentence on top of the report."""

from dataclasses import dataclass
from typing import Literal

from schemas.artifacts import Delta
from schemas.config import LOWER_IS_BETTER
from tasks.evaluation.champion import Rival
from tasks.evaluation.comparison import Comparison

FEW_CONVERSATIONS = 30
"""Below this many held-out conversations the report says that intervals are rough; our choice."""

Direction = Literal["better", "worse", "unclear", "changed"]
Tone = Literal["better", "worse", "mixed", "unclear"]


@dataclass(frozen=True)
class Measure:
    """How a metric is shown to a person."""

    label: str
    meaning: str
    form: Literal["percent", "points", "nats", "count", "tokens"]


MEASURES = {
    "exact_match": Measure(
        "Word-for-word right", "Answers that equal the expected answer, spaces aside. More is better.", "percent"
    ),
    "rouge_l": Measure(
        "Word overlap (ROUGE-L)",
        "How far answer and expected answer share their words in order; 100 % is all of them. More is better.",
        "percent",
    ),
    "chrf": Measure(
        "Spelling overlap (chrF)",
        "How far they share pieces of up to six characters, 0 to 100; forgives word forms. More is better.",
        "points",
    ),
    "nll": Measure(
        "Surprise (nll)",
        "How little the model expected each token of the right answer, in nats; 0 is certainty. Less is better.",
        "nats",
    ),
    "perplexity": Measure(
        "Perplexity",
        "The same as a number of choices: between how many equally likely tokens it wavers. Less is better.",
        "count",
    ),
    "repetition_rate": Measure(
        "Repetition", "Share of four-token phrases that an answer has said before. Less is better.", "percent"
    ),
    "answer_tokens": Measure("Answer length", "Tokens of an answer. Neither more nor less is better.", "tokens"),
}
"""In the order of the report."""

QUALITY = ("exact_match", "rouge_l", "chrf", "nll")
"""Measures that the verdict goes by, the most tangible first."""


def judge(name: str, delta: Delta) -> Direction:
    """Tell what a difference means; unclear when its interval includes zero."""
    if delta.ci_low <= 0.0 <= delta.ci_high:
        return "unclear"
    if name == "answer_tokens":
        return "changed"
    return "better" if (delta.value < 0) == (name in LOWER_IS_BETTER) else "worse"


def state_verdict(comparison: Comparison) -> tuple[Tone, str]:
    """Return the tone and the sentence: better, worse, mixed or unclear, with the most tangible measure."""
    judged = {name: judge(name, comparison.delta[name]) for name in QUALITY}
    better = [name for name in QUALITY if judged[name] == "better"]
    worse = [name for name in QUALITY if judged[name] == "worse"]
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
        "No clear difference: chance in the choice of the held-out rows could explain what was measured. "
        f"{_describe(comparison, 'exact_match', 'The fine-tuned model')}"
    )


def describe_rival(rival: Rival) -> str:
    """Say in a sentence how the new model stands to the champion."""
    report = rival.report
    who = f"champion (version {report.version})"
    if rival.comparison is None:
        return f"It could not be compared with the {who}: {'; '.join(report.notes)}."
    judged = {name: judge(name, report.delta[name]) for name in QUALITY}
    better = [name for name in QUALITY if judged[name] == "better"]
    worse = [name for name in QUALITY if judged[name] == "worse"]
    rows = f"{report.num_examples:,} held-out {'row' if report.num_examples == 1 else 'rows'}"
    if better and worse:
        found = f"it is better in {_list_labels(better)}, but worse in {_list_labels(worse)}"
    elif better or worse:
        found = f"it is {'better' if better else 'worse'} in {_list_labels(better or worse)}"
    else:
        found = "there is no clear difference"
    return f"Against the {who}, on {rows}: {found} ({'; '.join(report.notes)})."


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
    return f"{MEASURES[name].label} went from {before} to {after} over {rows}."


def _list_labels(names: list[str]) -> str:
    """Name measures in a running sentence."""
    return ", ".join(label[0].lower() + label[1:] for label in (MEASURES[name].label for name in names))


def list_caveats(comparison: Comparison) -> list[str]:
    """Return what a reader of the figures should know, a sentence each."""
    caveats: list[str] = []
    num_conversations = comparison.table["example_id"].n_unique()
    if num_conversations == 1:
        caveats.append("There is one held-out conversation only: nothing can be said about chance. Hold out more.")
    elif num_conversations < FEW_CONVERSATIONS:
        caveats.append(
            f"There are only {num_conversations} held-out conversations: the intervals are rough. "
            f"Hold out at least {FEW_CONVERSATIONS}."
        )
    if judge("repetition_rate", comparison.delta["repetition_rate"]) == "worse":
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
    form = MEASURES[name].form
    if form == "percent":
        return f"{100 * value:.1f} %"
    if form == "nats":
        return f"{value:.3f}"
    if form == "count":
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return f"{value:.1f}"


def format_change(name: str, value: float) -> str:
    """Write a difference with its sign; percentages differ by points."""
    form = MEASURES[name].form
    text = f"{100 * abs(value):.1f}" if form == "percent" else format_value(name, abs(value))
    # A difference that rounds to nothing has no sign.
    sign = "" if not text.strip("0.,") else "+" if value > 0 else "\N{MINUS SIGN}"
    return sign + text + (" points" if form == "percent" else "")
