"""Forgetting: the base model and the new one compared on the further held-out sets."""

from collections.abc import Iterable
from pathlib import Path

import polars as pl

from schemas.artifacts import ProbeReport
from schemas.config import EvaluationConfig, ProbeConfig
from tasks.evaluation.comparison import compare
from tasks.evaluation.metrics import METRICS

PROBES_FOLDER = "probes"
"""Below the folder of an evaluation: the rows of each probe."""


def compare_probe(probe: ProbeConfig, before: Path, after: Path, config: EvaluationConfig, *, seed: int) -> ProbeReport:
    """Compare the base model's evaluation with the new one's on a probe.

    Args:
        probe: its metric and margin.
        before: folder of the base model's evaluation.
        after: folder of the new model's.
        config: resamples and confidence.
        seed: of the resamples.
    """
    rows = [pl.read_parquet(folder / PROBES_FOLDER / f"{probe.name}.parquet") for folder in (before, after)]
    comparison = compare(rows[0], rows[1], config, seed=seed, judged=(probe.metric,))
    return ProbeReport(
        name=probe.name,
        metric=probe.metric,
        max_loss=probe.max_loss,
        num_conversations=comparison.num_conversations,
        before=comparison.before[probe.metric],
        after=comparison.after[probe.metric],
        delta=comparison.delta[probe.metric],
    )


def warn_of_probes(probes: Iterable[ProbeReport]) -> list[str]:
    """Return what a person should know: probes that can show no loss, and losses within the margin."""
    warnings = []
    for probe in probes:
        metric = METRICS[probe.metric]
        if metric.direction == "higher" and probe.before <= probe.max_loss:
            warnings.append(
                f"Probe {probe.name} can show no loss beyond {probe.max_loss:g}: the base model has {probe.metric} "
                f"{probe.before:.4g}. Choose rows that it does well, or a smaller evaluation.probes max_loss."
            )
        if probe.delta.is_beyond_chance and metric.gain(probe.delta.value) < 0:
            warnings.append(
                f"On probe {probe.name} the fine-tuned model is worse than the base model: {probe.metric} went from "
                f"{probe.before:.4g} to {probe.after:.4g} (interval of the change {probe.delta.interval})."
            )
    return warnings
