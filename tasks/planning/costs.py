"""What a training's steps cost, by what earlier ones on this device took: eight costs, none below zero.

    seconds = a steps + b steps * trained values + c passes * layers + d products + e values between the products
              + f the adapter's products + g attention's products + h recordings of passes * layers

Earlier trainings are few, and seldom tell all eight apart. So each cost has a usual size (_USUAL; only proportions
count), and is taken to be off by its own size (_PRIOR): Bayesian linear regression with known noise (Bishop, Pattern
Recognition and Machine Learning, 2006, section 3.3). What the trainings say takes over where they say something; where
they do not, the bar is as wide as that. Errors are relative: each training counts by its seconds.

Legend: `N` earlier trainings, `K` costs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.planning.estimates import Estimate

Floats = NDArray[np.float64]
_USUAL = {
    "cpu": (4e-3, 3e-9, 6e-4, 1.2e-11, 1.2e-8, 2e-11, 3e-11, 1.0),
    "cuda": (3e-3, 1.5e-11, 1.4e-3, 2e-15, 4e-11, 4e-15, 5e-15, 2e-3),
}
"""Seconds of each cost's unit: of one core, and of a large GPU. Orders of magnitude, chosen by hand."""
_REPLAYED = 0.5
"""Part of a pass's own seconds that it still takes where it is recorded and replayed."""
_AGAIN = 0.36
"""What a layer's second run adds to its products: two of four, without the last matrix's, 0.29 of the weights."""
_PRIOR = 1.0
"""Standard deviation of a cost, as a part of its usual size."""
SAME_NOISE, OTHER_NOISE = 0.04, 0.25
"""Standard deviations, as parts of the seconds: of a training of this model when it is done again, and of one of
another model, whose products are of another size. The first is widened by what the trainings themselves show."""
_LEAST_FREEDOM = 1.0
"""Trainings beyond those that the fit takes up, from which on their scatter says anything."""
_NORMAL = 1.96
_WIDE = 2.0


@dataclass(frozen=True)
class Seen:
    """An earlier training's steps."""

    work: Mapping[str, float]
    seconds: float
    noise: float
    """Standard deviation, as a part of its seconds, with which it speaks for the training to come."""


def list_terms(work: Mapping[str, float]) -> Floats:
    """Return the units [K] of each cost.

    Args:
        work: of a training's steps, as `tasks.training.pace` notes it: counts over all ranks and sizes of the model;
            `flop` is the useful work of a token of its body, `head_flop` of a row of its head. Ranks that share a pass
            (`sharing`; one where a line does not say) each do all of its layers, for their part of its tokens.
    """
    ranks, again, sharing = max(1.0, work["ranks"]), work["recomputed"], work.get("sharing", 1.0)
    layers, hidden, trained = work["layers"], work["hidden"], work["trained"]
    passes, tokens, rows, squares = (work[name] / ranks for name in ("passes", "tokens", "head_rows", "squares"))
    passes -= (1 - _REPLAYED) * work.get("replayed", 0.0) / ranks
    return np.array(
        [
            work["steps"],
            work["steps"] * trained,
            passes * sharing * layers * (1 + again / 2),
            tokens * work["flop"] * (1 + again * _AGAIN) + rows * work["head_flop"],
            tokens * layers * hidden * (1 + again / 3) + rows * work["vocabulary"] / 2,
            tokens * work["adapter_flop"] * (1 + again / 3),
            6 * squares * layers * hidden * (1 + again / 3),
            work.get("new_shapes", 0.0) / ranks * layers,
        ]
    )


def predict_steps(seen: Sequence[Seen], work: Mapping[str, float], *, device: str, noise: float) -> Estimate | None:
    """Predict the seconds of a training's steps.

    Args:
        seen: earlier ones.
        work: of the steps to come.
        device: cpu or cuda.
        noise: standard deviation of what is predicted, as a part of it, beyond what the costs leave open.

    Returns:
        Seconds; None where nothing was seen.
    """
    if not seen:
        return None
    usual = np.array(_USUAL[device])
    terms = np.array([list_terms(each.work) for each in seen]) * usual
    seconds, noises = np.array([each.seconds for each in seen]), np.array([each.noise for each in seen])
    nearest = noises == noises.min()
    scale = float(np.median(seconds[nearest] / terms[nearest].sum(axis=1)))
    wanted = list_terms(work) * usual * scale
    value, part = predict_sum(terms * scale, seconds, noises, wanted, priors=np.full(len(usual), _PRIOR), noise=noise)
    return Estimate(value, value / (1 + part), value * (1 + part))


def predict_sum(
    terms: Floats, totals: Floats, noises: Floats, wanted: Floats, *, priors: Floats, noise: float
) -> tuple[float, float]:
    """Predict a sum of parts of which earlier sums are known; return it, and its bar as a part of it.

    Args:
        terms: [N, K] parts of the earlier sums, as they would usually be.
        totals: [N] what was measured.
        noises: [N] standard deviations of the measured, as parts of it.
        wanted: [K] parts of the sum to come, as they would usually be.
        priors: [K] standard deviations of the parts, as parts of what they usually are.
        noise: standard deviation of the sum to come, as a part of it, beyond what the parts leave open.
    """
    design = terms / totals[:, None]
    factors, covariance = _fit(design, noises, priors)
    errors = (design @ factors - 1) / noises
    leverage = np.einsum("nk,kj,nj->n", design, covariance, design) / noises**2
    freedom = len(totals) - float(leverage.sum())
    spread = math.sqrt(max(1.0, float(errors @ errors) / freedom)) if freedom > _LEAST_FREEDOM else 1.0
    value = float(wanted @ factors)
    deviation = spread * math.sqrt(float(wanted @ covariance @ wanted) / value**2 + noise**2)
    return value, min(_WIDE, math.expm1(_NORMAL * deviation))


def _fit(design: Floats, noises: Floats, priors: Floats) -> tuple[Floats, Floats]:
    """Return the likeliest factors [K] of the usual parts, none below 0, and their covariance [K, K].

    Args:
        design: [N, K], each row divided by what was measured, so that the factors should give 1.
        noises: [N], standard deviations.
        priors: [K], standard deviations of the factors around 1.
    """
    rows = design / noises[:, None]
    precision = rows.T @ rows + np.diag(1 / priors**2)
    wanted = rows.T @ (1 / noises) + 1 / priors**2
    factors, free = np.zeros(len(wanted)), np.ones(len(wanted), bool)
    while free.any():
        factors[:] = 0.0
        factors[free] = np.linalg.solve(precision[np.ix_(free, free)], wanted[free])
        if (factors >= 0).all():
            break
        free &= factors > 0
    covariance = np.asarray(np.linalg.inv(precision), np.float64)
    return factors, covariance
