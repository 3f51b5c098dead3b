"""From rows to one number a metric."""

import math

import polars as pl

AVERAGED = ("exact_match", "rouge_l", "chrf", "repetition_rate", "answer_tokens")
"""Metrics that are plain means over the rows."""
METRICS = ("nll", "perplexity", *AVERAGED)


def average_rows(rows: pl.DataFrame) -> dict[str, float]:
    """Return each metric over the rows: plain means, but nll a token over all tokens, and perplexity = exp(nll)."""
    values = {name: rows[name].to_numpy() for name in ("nll_sum", "num_tokens", *AVERAGED)}
    nll = float(values["nll_sum"].sum() / values["num_tokens"].sum())
    # exp overflows a float above 709.
    metrics = {"nll": nll, "perplexity": math.exp(nll) if nll < 709 else math.inf}
    return metrics | {name: float(values[name].mean()) for name in AVERAGED}
