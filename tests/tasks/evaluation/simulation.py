"""The gate on made-up models, many at once: how often it promotes one that is equal to its base, or better by so much.

A draw is a held-out set with two models' results on it. What makes a row hard is common to both; apart from that each
model's results are drawn for themselves, so that without a gain the two are equal, though they never say the same.

Dimensions: `N` conversations, `D` draws.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from schemas.artifacts import Delta
from schemas.config import GateConfig
from tasks.evaluation import paired
from tasks.evaluation.gate import judge
from tasks.evaluation.metrics import METRICS, Floats

CONFIDENCE = 0.95
NAMES = ("nll", "exact_match", "chrf", "repetition_rate", "empty_answers")


@dataclass(frozen=True)
class Results:
    """Results of two models on D held-out sets of N conversations of one row each."""

    before: dict[str, Floats]
    """Column of each metric, `[N, D]`."""
    after: dict[str, Floats]
    num_tokens: Floats
    """Of the references, `[N]`."""

    def weights(self, name: str) -> Floats:
        return self.num_tokens if METRICS[name].weight == "token" else np.ones_like(self.num_tokens)


def draw_results(
    num_conversations: int,
    num_draws: int,
    source: np.random.Generator,
    *,
    nll_gain: float = 0.0,
    exact_gain: float = 0.0,
    is_free_text: bool = False,
) -> Results:
    """Draw two models; the second has a mean nll lower by `nll_gain` (a share), and `exact_gain` more exact matches.

    Short answers are word-for-word right in a quarter of the rows; free text never is, and its chrF varies less.
    """
    shape = (num_conversations, num_draws)
    num_tokens = source.integers(5, 60, num_conversations).astype(np.float64)
    difficulty = source.gamma(4.0, 0.5, shape)  # nats a token: skewed, as real ones are
    skill = source.beta(1.0, 3.0, shape)  # chance of an exact match, a quarter in the mean
    likeness = 100 * source.beta(2.0, 5.0, shape)
    sides = []
    for nll_share, exact_share in ((1.0, 0.0), (1.0 - nll_gain, exact_gain / 0.75)):
        noise = np.exp(source.normal(-0.045, 0.3, shape))
        exact = (source.random(shape) < skill + exact_share * (1 - skill)).astype(np.float64)
        chrf = np.where(exact > 0, 100.0, 100 * source.beta(2.0, 5.0, shape))
        if is_free_text:
            exact, chrf = np.zeros(shape), np.clip(likeness + source.normal(0.0, 8.0, shape), 0.0, 100.0)
        sides.append(
            {
                "nll": difficulty * noise * nll_share * num_tokens[:, None],
                "exact_match": exact,
                "chrf": chrf,
                "repetition_rate": (source.random(shape) < 0.02) * source.beta(5.0, 2.0, shape),
                "empty_answers": (source.random(shape) < 0.005).astype(np.float64),
            }
        )
    return Results(sides[0], sides[1], num_tokens)


def measure_deltas(
    results: Results, gate: GateConfig, source: np.random.Generator, num_resamples: int = 400
) -> list[dict[str, Delta]]:
    """Compare the models of each draw as `comparison.compare` does; one set of resamples serves all draws."""
    num, num_draws = results.before["nll"].shape
    differences = {name: results.after[name] - results.before[name] for name in NAMES}
    stacked = np.hstack([differences[name] for name in NAMES])
    weights = np.stack([results.weights(name) for name in NAMES], axis=1)
    counts = list(paired.draw_counts(num, num_resamples, source))
    signs = paired.draw_signs(num, paired.count_randomizations(CONFIDENCE, num_resamples), source)
    resamples = paired.resample(stacked, iter(counts)) / np.repeat(paired.resample(weights, iter(counts)), num_draws, 1)
    values = stacked.sum(axis=0) / np.repeat(weights.sum(axis=0), num_draws)
    low, high = paired.find_interval(resamples, values, paired.tail_probability(CONFIDENCE, num))
    p_values = paired.randomize(stacked, signs)
    found: list[dict[str, Delta]] = []
    for draw in range(num_draws):
        at = {name: place * num_draws + draw for place, name in enumerate(NAMES)}
        judged = paired.correct_p_values({name: float(p_values[at[name]]) for name in gate.metrics})
        found.append(
            {
                name: Delta(
                    value=float(values[at[name]]),
                    ci_low=float(low[at[name]]),
                    ci_high=float(high[at[name]]),
                    p_value=judged.get(name),
                    confidence=CONFIDENCE,
                )
                for name in NAMES
            }
        )
    return found


def find_rate(deltas: list[dict[str, Delta]], gate: GateConfig, num_conversations: int) -> float:
    """Return how often the gate promotes."""
    verdicts = [judge(delta, gate, num_conversations=num_conversations).verdict for delta in deltas]
    return verdicts.count("promoted") / len(verdicts)


def simulate(num_conversations: int, num_draws: int, gate: GateConfig, seed: int, **models: Any) -> float:
    """Return how often the gate promotes such models (see `draw_results`)."""
    source = np.random.default_rng(seed)
    results = draw_results(num_conversations, num_draws, source, **models)
    return find_rate(measure_deltas(results, gate, source), gate, num_conversations)
