"""What the held-out rows can show: the smallest effect that they would reveal, known before anything is trained."""

import math
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import polars as pl

from schemas.config import EvaluationConfig, GateConfig
from tasks.evaluation import paired
from tasks.evaluation.metrics import METRICS, Floats, column_of, weights_of
from tasks.evaluation.verdict import format_value

POWER = 0.8
"""How often an effect of the smallest size would be found."""


def find_smallest_effect(values: Floats, weights: Floats, *, is_binary: bool, level: float) -> float | None:
    """Return the smallest change of a weighted mean that a paired comparison finds in four of five cases.

    How far the differences will vary is not known before training. The base model's own values stand in for it: two
    models whose values vary alike and correlate by one half have differences that vary as the values do.

    Where a row is right or wrong, at least six conversations must change, all to one side, before chance is excluded
    at 5 %: the effect must be large enough for that too, even when no answer gets worse.

    Args:
        values: sums over each conversation of the base model's values, `[N]`.
        weights: sums over each conversation of the weights, `[N]`.
        is_binary: a row's value is 0 or 1.
        level: two-sided level of the test, such as 0.05.

    Returns:
        The change, in the unit of the mean; None when no change whatever would be found.
    """
    num = len(values)
    if num < 2:
        return None
    residuals = values - values.sum() / weights.sum() * weights
    error = math.sqrt(num / (num - 1) * float((residuals**2).sum())) / float(weights.sum())
    quantile = paired.student_quantile(1 - level / 2, num - 1) + NormalDist().inv_cdf(POWER)
    effect = quantile * error
    if is_binary:
        fewest = math.ceil(1 - math.log2(level))  # 2 * 2^-k is at most the level
        least = _find_least_share(num, fewest)
        if least is None:
            return None
        effect = max(effect, least)
    return effect


def _find_least_share(num: int, fewest: int) -> float | None:
    """Return the smallest share k / num of which at least `fewest` of `num` are hit in four of five cases."""
    for count in range(fewest, num + 1):
        share = count / num
        too_few = sum(math.comb(num, k) * share**k * (1 - share) ** (num - k) for k in range(fewest))
        if 1 - too_few >= POWER:
            return share
    return None


def expect_effects(
    rows: pl.DataFrame, conversations: Mapping[str, str], config: EvaluationConfig, gate: GateConfig
) -> tuple[str, tuple[str, ...]]:
    """Say what the held-out rows can show, from the base model's answers, before training.

    Args:
        rows: the base model's (EvaluationRows).
        conversations: example_id to the source conversation.
        config: confidence.
        gate: its metrics and limits.

    Returns:
        A sentence for people, and warnings: too few conversations to promote anything.
    """
    if rows.is_empty():
        return "0 held-out conversations can show no change of anything", (
            "No row is held out, so that nothing can show whether the fine-tuned model is better: it stays challenger. "
            "Hold out a part (data.eval_fraction, data.eval_source) to have it judged",
        )
    groups = rows["example_id"].replace(conversations)
    num = groups.n_unique()
    level = (1 - config.confidence) / len(gate.metrics)
    found, open_names = [], []
    for name in gate.metrics:
        if METRICS[name].measure is None:
            effect = _find_coin_effect(num, level) if name == "reward_accuracy" else None
            if effect is None:
                open_names.append(name)
            else:
                found.append(f"{format_value(name, effect)} in {name}" + _compare_with_limit(effect, gate.min_gain))
            continue
        frame = pl.DataFrame({"group": groups, "value": rows[column_of(name)], "weight": weights_of(rows, name)})
        sums = frame.group_by("group", maintain_order=True).sum()
        values, weights = (sums[column].to_numpy().astype(np.float64) for column in ("value", "weight"))
        effect = find_smallest_effect(values, weights, is_binary=METRICS[name].is_binary, level=level)
        if effect is not None:
            mean = values.sum() / weights.sum()
            change = abs(float(METRICS[name].link(mean + effect) - METRICS[name].link(mean)))
            found.append(f"{format_value(name, change)} in {name}" + _compare_with_limit(change, gate.min_gain))
    who = f"{num:,} held-out conversation{'s' if num != 1 else ''}"
    if open_names and not found:
        sentence = f"What change of {', '.join(open_names)} {who} can show depends on what is learned"
        return sentence, _warn_of_few(num, who, gate)
    sentence = (
        f"{who} can show a change of {' or '.join(found)}, in four of five cases; smaller ones look like chance"
        if found
        else f"{who} can show no change of {', '.join(gate.metrics)}, however large: chance is never excluded"
    )
    return sentence, _warn_of_few(num, who, gate)


def _find_coin_effect(num: int, level: float) -> float | None:
    """Return the smallest change of a share of right pairs that is found, where the base has half of them right."""
    return find_smallest_effect(np.tile((0.0, 1.0), num)[:num], np.ones(num), is_binary=False, level=level)


def _warn_of_few(num: int, who: str, gate: GateConfig) -> tuple[str, ...]:
    """Return a warning where there are too few conversations to promote anything."""
    if num >= gate.min_conversations:
        return ()
    return (
        f"{who} {'are' if num != 1 else 'is'} too few to promote a version: registry.gate.min_conversations is "
        f"{gate.min_conversations}. Whatever this version gains, it stays challenger. Hold out more "
        "(data.eval_fraction, data.eval_source, evaluation.max_examples)",
    )


def _compare_with_limit(change: float, min_gain: float) -> str:
    return f" (registry.gate.min_gain = {min_gain:g} asks for more)" if min_gain > change else ""
