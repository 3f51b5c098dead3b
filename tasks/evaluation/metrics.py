"""The table of metrics: a metric is one row of it. Scoring, comparison, gate, report, terminal and MLflow read it."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.evaluation.answers import chrf, exact_match, repetition_rate, rouge_l

Floats = NDArray[np.float64]


class MetricError(ValueError):
    """A setting names a metric that is not in the table."""


@dataclass(frozen=True)
class ScoredAnswer:
    """A held-out row with what a model made of it."""

    answer: str
    """Decoded, without special tokens."""
    reference: str
    answer_ids: Sequence[int]
    nll_sum: float
    """Of the reference and its end of turn, in nats."""
    num_tokens: int
    """Tokens in that sum."""


def _keep(values: Any) -> Any:
    return values


def _exp(values: Any) -> Any:
    with np.errstate(over="ignore"):  # above 709 it is infinite
        return np.exp(values)


@dataclass(frozen=True)
class Metric:
    """A measure of answers: how a row is measured, how rows become one number, and how people read it.

    The number is `link(sum of the rows' values / sum of their weights)`.
    """

    label: str
    meaning: str
    """For people: what it is, in a sentence or two."""
    form: Literal["percent", "points", "nats", "count", "tokens"]
    """How a value is written; percent is kept as a share of one."""
    direction: Literal["higher", "lower", "neither"]
    """Which side is better."""
    measure: Callable[[ScoredAnswer], float] | None
    """Gives a row's value; None: pairs of answers have it, by comparison with the base (see `preferences`)."""
    bounds: tuple[float, float] = (0.0, float("inf"))
    """Of a row's value."""
    weight: Literal["row", "token"] = "row"
    """row: each row counts once; token: a row's value is a sum over the reference's tokens."""
    link: Callable[[Any], Any] = _keep
    """Applied to the mean; increasing."""
    column: str = ""
    """Where the rows' values are kept; empty: under the metric's name. Who shares another's is derived from it."""
    guard_margin: float | None = None
    """Loss that the gate tolerates where no setting says otherwise; None: the gate does not look at it."""
    is_binary: bool = False
    """A row's value is 0 or 1."""

    def gain(self, change: float) -> float:
        """Return a change with its sign turned where lower is better."""
        return (-change if self.direction == "lower" else change) + 0.0  # -0.0 becomes 0.0

    def gains(self, low: float, high: float) -> tuple[float, float]:
        """Return an interval of changes as gains, the worse end first."""
        first, second = sorted((self.gain(low), self.gain(high)))
        return first, second


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        label="Word-for-word right",
        meaning="Answers that equal the expected answer, spaces aside. More is better.",
        form="percent",
        direction="higher",
        measure=lambda row: exact_match(row.answer, row.reference),
        bounds=(0, 1),
        is_binary=True,
    ),
    "rouge_l": Metric(
        label="Word overlap (ROUGE-L)",
        meaning="How far answer and expected answer share their words in order; 100 % is all of them. More is better.",
        form="percent",
        direction="higher",
        measure=lambda row: rouge_l(row.answer, row.reference),
        bounds=(0, 1),
    ),
    "chrf": Metric(
        label="Spelling overlap (chrF)",
        meaning="How far they share pieces of up to six characters, 0 to 100; forgives word forms. More is better.",
        form="points",
        direction="higher",
        measure=lambda row: chrf(row.answer, row.reference),
        bounds=(0, 100),
        guard_margin=5.0,
    ),
    "nll": Metric(
        label="Surprise (nll)",
        meaning="How little the model expected each token of the right answer, in nats; 0 is certainty. "
        "Less is better.",
        form="nats",
        direction="lower",
        measure=lambda row: row.nll_sum,
        weight="token",
        column="nll_sum",
    ),
    "perplexity": Metric(
        label="Perplexity",
        meaning="The same as a number of choices: between how many equally likely tokens it wavers. Less is better.",
        form="count",
        direction="lower",
        measure=lambda row: row.nll_sum,
        weight="token",
        link=_exp,
        column="nll_sum",
    ),
    "repetition_rate": Metric(
        label="Repetition",
        meaning="Share of four-token phrases that an answer has said before. Less is better.",
        form="percent",
        direction="lower",
        measure=lambda row: repetition_rate(row.answer_ids),
        bounds=(0, 1),
        guard_margin=0.1,
    ),
    "empty_answers": Metric(
        label="No answer",
        meaning="Answers without a visible character. Less is better.",
        form="percent",
        direction="lower",
        measure=lambda row: float(not row.answer.strip()),
        bounds=(0, 1),
        guard_margin=0.1,
        is_binary=True,
    ),
    "answer_tokens": Metric(
        label="Answer length",
        meaning="Tokens of an answer. Neither more nor less is better.",
        form="tokens",
        direction="neither",
        measure=lambda row: len(row.answer_ids),
    ),
    "preference_loss": Metric(
        label="Preference loss",
        meaning="The loss of direct preference optimization: small where the chosen answer became more likely than the "
        "rejected one, measured from the base model. Less is better.",
        form="nats",
        direction="lower",
        measure=None,
    ),
    "reward_accuracy": Metric(
        label="Right preference",
        meaning="Pairs of which the chosen answer gained more than the rejected one; one half is chance, and the base "
        "model has that by definition. More is better.",
        form="percent",
        direction="higher",
        measure=None,
        bounds=(0, 1),
    ),
    "reward_margin": Metric(
        label="Reward margin",
        meaning="How much more the chosen answer gained than the rejected one: beta times nats. More is better.",
        form="nats",
        direction="higher",
        measure=None,
        bounds=(float("-inf"), float("inf")),
    ),
}
"""By name, in the order of the report."""


def column_of(name: str) -> str:
    """Return the column in which a metric's row values are kept."""
    return METRICS[name].column or name


def columns() -> dict[str, str]:
    """Return each column of row values with the first metric that is read from it."""
    found: dict[str, str] = {}
    for name in METRICS:
        found.setdefault(column_of(name), name)
    return found


def measured_columns() -> dict[str, str]:
    """Return those of the columns that every evaluation measures."""
    return {column: name for column, name in columns().items() if METRICS[name].measure is not None}


def metrics_of(rows: pl.DataFrame) -> dict[str, Metric]:
    """Return the metrics that the rows of an evaluation have."""
    return {name: metric for name, metric in METRICS.items() if column_of(name) in rows.columns}


def is_derived(name: str) -> bool:
    """Tell whether a metric says with another scale what one above it in the table says."""
    return columns()[column_of(name)] != name


def check_metrics(names: Iterable[str], setting: str, known: Collection[str] = METRICS.keys()) -> None:
    """Refuse names that are not known.

    Raises:
        MetricError: a name is unknown; it names the setting and the known ones.
    """
    for name in names:
        if name not in known:
            raise MetricError(f"{setting} = {name!r}: no such metric to judge by; known are {', '.join(known)}")


def weights_of(rows: pl.DataFrame, name: str) -> pl.Series:
    """Return the weights of the rows in a metric."""
    if METRICS[name].weight == "token":
        return rows["num_tokens"].cast(pl.Float64)
    return pl.Series("weight", np.ones(rows.height))


def row_values(rows: pl.DataFrame, name: str) -> pl.Series:
    """Return a metric of each row by itself."""
    values = rows[column_of(name)] / weights_of(rows, name)
    return pl.Series(name, METRICS[name].link(values.to_numpy()))


def average_rows(rows: pl.DataFrame) -> dict[str, float]:
    """Return each metric over the rows of an evaluation; none without rows."""
    if rows.is_empty():
        return {}
    return {
        name: float(metric.link(float(rows[column_of(name)].sum()) / float(weights_of(rows, name).sum())))
        for name, metric in metrics_of(rows).items()
    }
