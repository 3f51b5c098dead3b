"""The gate: may this version become champion? A pure decision, with its reasons in words."""

from collections.abc import Mapping
from typing import Literal

from schemas.artifacts import ChampionReport, Delta
from schemas.config import LOWER_IS_BETTER, GateConfig

Verdict = tuple[Literal["promoted", "refused"], tuple[str, ...]]


def judge(delta: Mapping[str, Delta], gate: GateConfig, champion: ChampionReport | None = None) -> Verdict:
    """Decide on the comparisons with the base model and with the champion, and say why.

    A gain is an improvement: `after - before`, with its sign turned where lower is better. Over the base model it must
    be larger than `min_gain`, and with `require_significance` the whole interval must lie on the better side of zero.
    Over the champion it must be larger than `min_gain_over_champion` = m, and the interval must lie above min(0, m):
    for m < 0 this is the usual test of non-inferiority. A champion that could not be compared stays.

    Args:
        delta: new version minus base model.
        gate: what is asked for.
        champion: new version minus champion; None when there is none.
    """
    measured, against = _judge_gain(delta[gate.metric], gate, "the base model", "min_gain", gate.min_gain)
    found, refusals = [measured], against
    if champion is not None:
        who = f"champion version {champion.version}"
        if champion.num_examples:
            least = gate.min_gain_over_champion
            measured, against = _judge_gain(
                champion.delta[gate.metric], gate, who, "min_gain_over_champion", least, floor=min(0.0, least)
            )
        else:
            why = "; ".join(champion.notes)
            measured = f"{who} could not be compared ({why})"
            against = [f"{measured}: it stays until somebody promotes another version by hand"]
        found.append(measured)
        refusals = refusals + against
    return ("refused", tuple(refusals)) if refusals else ("promoted", tuple(found))


def _judge_gain(
    change: Delta, gate: GateConfig, rival: str, setting: str, least: float, floor: float = 0.0
) -> tuple[str, list[str]]:
    """Return what was gained over a rival, and what speaks against it."""
    sign = -1.0 if gate.metric in LOWER_IS_BETTER else 1.0
    gain = sign * change.value
    low, high = sorted((sign * change.ci_low, sign * change.ci_high))
    measured = f"{gate.metric} gained {gain:.4g} over {rival} (interval {low:.4g} to {high:.4g})"
    against = []
    if not gain > least:
        against.append(f"{measured}: more than registry.gate.{setting} = {least:g} is wanted")
    if gate.require_significance and not low > floor:
        against.append(f"{measured}: the interval does not exclude {f'{floor:g}' if floor else 'zero'}")
    return measured, against
