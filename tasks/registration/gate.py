"""The gate: may this version become champion? A pure decision, with its reasons in words."""

from collections.abc import Mapping
from typing import Literal

from schemas.artifacts import Delta
from schemas.config import LOWER_IS_BETTER, GateConfig


def judge(delta: Mapping[str, Delta], gate: GateConfig) -> tuple[Literal["promoted", "refused"], tuple[str, ...]]:
    """Decide on a comparison (after minus before) and say why.

    A gain is an improvement: `after - before`, with its sign turned where lower is better. The gain must be larger
    than `min_gain`, and with `require_significance` the whole interval must lie on the better side of zero.
    """
    change = delta[gate.metric]
    sign = -1.0 if gate.metric in LOWER_IS_BETTER else 1.0
    gain = sign * change.value
    low = min(sign * change.ci_low, sign * change.ci_high)
    high = max(sign * change.ci_low, sign * change.ci_high)
    measured = f"{gate.metric} gained {gain:.4g} over the base model (interval {low:.4g} to {high:.4g})"
    against = []
    if not gain > gate.min_gain:
        against.append(f"{measured}: more than registry.gate.min_gain = {gate.min_gain:g} is wanted")
    if gate.require_significance and not low > 0:
        against.append(f"{measured}: the interval does not exclude zero")
    return ("refused", tuple(against)) if against else ("promoted", (measured,))
