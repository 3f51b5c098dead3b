"""The gate: may this version become champion? A pure decision, with its reasons in words.

A version is promoted when every check passes, so that each check keeps its own level and none needs to be corrected for
the others. Only where a gain in one of several metrics is enough, their p-values are corrected (comparison.py).
"""

from collections.abc import Iterator, Mapping, Sequence

from schemas.artifacts import ChampionReport, Decision, Delta, GateCheck, ProbeReport
from schemas.config import GateConfig, ProbeConfig
from tasks.evaluation.metrics import METRICS, check_metrics


def check_settings(gate: GateConfig, probes: Sequence[ProbeConfig] = ()) -> None:
    """Refuse metrics that are not in the table, and one of which neither side is better.

    Raises:
        MetricError: which setting, and what is known.
    """
    check_metrics((gate.metric,), "registry.gate.metric")
    check_metrics(gate.further_metrics, "registry.gate.further_metrics")
    check_metrics(gate.guards, "registry.gate.guards")
    judged = [name for name, metric in METRICS.items() if metric.direction != "neither"]
    check_metrics((*gate.metrics, *gate.guards), "registry.gate", judged)
    single = [name for name in judged if METRICS[name].measure is not None]
    for number, probe in enumerate(probes):
        check_metrics((probe.metric,), f"evaluation.probes.{number}.metric", single)


def judge(
    delta: Mapping[str, Delta],
    gate: GateConfig,
    champion: ChampionReport | None = None,
    *,
    num_conversations: int,
    probes: Sequence[ProbeReport] = (),
) -> Decision:
    """Decide on the comparisons with the base model and with the champion, and say why.

    A gain is an improvement: `after - before`, with its sign turned where lower is better. Over the base model it must
    be larger than `min_gain`, and with `require_significance` the whole interval must lie on the better side of zero
    and the randomization test must agree. Over the champion it must be larger than `min_gain_over_champion` = m, and
    the interval must lie above min(0, m): for m < 0 this is the usual test of non-inferiority. A champion that could
    not be compared stays. No guard may get worse by more than its margin, the worse end of its interval included.
    Each comparison needs `min_conversations`. On a probe no more than its own margin may be lost.

    Args:
        delta: new version minus base model.
        gate: what is asked for.
        champion: new version minus champion; None when there is none.
        num_conversations: held-out conversations of the comparison with the base model.
        probes: new version and base model on further sets.
    """
    checks = list(_check_rival(delta, gate, "the base model", num_conversations, "min_gain", gate.min_gain))
    if champion is not None:
        checks += _check_champion(champion, gate)
    checks += [_check_probe(probe, gate) for probe in probes]
    return Decision(verdict="promoted" if all(check.passed for check in checks) else "refused", checks=tuple(checks))


def find_margins(gate: GateConfig) -> dict[str, float]:
    """Return the guards in force: metric to the largest tolerated loss. What has to gain needs no guard."""
    margins = {name: metric.guard_margin for name, metric in METRICS.items()} | gate.guards
    return {name: margin for name, margin in margins.items() if margin is not None and name not in gate.metrics}


def _check_champion(champion: ChampionReport, gate: GateConfig) -> Iterator[GateCheck]:
    who = f"champion version {champion.version}"
    if champion.num_examples:
        least = gate.min_gain_over_champion
        yield from _check_rival(
            champion.delta, gate, who, champion.num_conversations, "min_gain_over_champion", least, min(0.0, least)
        )
        return
    finding = (
        f"{who} could not be compared ({'; '.join(champion.notes)}): it stays until somebody promotes another version "
        "by hand"
    )
    yield GateCheck(kind="champion", passed=False, finding=finding)


def _check_rival(
    delta: Mapping[str, Delta],
    gate: GateConfig,
    rival: str,
    num_conversations: int,
    setting: str,
    least: float,
    floor: float = 0.0,
) -> Iterator[GateCheck]:
    """Give what was found against one rival."""
    yield _check_number(num_conversations, gate, rival)
    if not delta:
        return
    gains = [_check_gain(name, delta[name], gate, rival, setting, least, floor) for name in gate.metrics]
    # One gain is enough; the others are then not held against the version.
    any_gained = any(check.passed for check in gains)
    yield from (check for check in gains if check.passed or not any_gained)
    for name, margin in find_margins(gate).items():
        yield _check_guard(name, delta[name], margin, rival)


def _check_number(num_conversations: int, gate: GateConfig, rival: str) -> GateCheck:
    finding = f"{num_conversations:,} held-out conversations to compare with {rival}"
    if not num_conversations:
        finding = (
            "the gate cannot judge: no conversation was held out, so that nothing is known of this version beside "
            f"{rival}; it stays challenger until somebody promotes it by hand (data.eval_fraction, data.eval_source)"
        )
        return GateCheck(kind="conversations", passed=False, finding=finding)
    passed = num_conversations >= gate.min_conversations
    if not passed:
        finding += (
            f": at least registry.gate.min_conversations = {gate.min_conversations} are wanted: hold out more "
            "(data.eval_fraction, data.eval_source, evaluation.max_examples)"
        )
    return GateCheck(kind="conversations", passed=passed, finding=finding)


def _check_probe(probe: ProbeReport, gate: GateConfig) -> GateCheck:
    """Say whether what the base model does well is still done."""
    metric, change = METRICS[probe.metric], probe.delta
    worst = -metric.gains(change.ci_low, change.ci_high)[0]
    finding = (
        f"probe {probe.name}: {probe.metric} went from {probe.before:.4g} to {probe.after:.4g} on "
        f"{probe.num_conversations:,} conversations (change {change.change}, interval {change.interval}); a loss of up "
        f"to {probe.max_loss:g} is tolerated"
    )
    against = []
    if worst > probe.max_loss:
        lost = -metric.gain(change.value) > probe.max_loss
        against.append("it was forgotten" if lost else "these rows leave open whether more was forgotten")
    if probe.num_conversations < gate.min_conversations:
        against.append(f"at least registry.gate.min_conversations = {gate.min_conversations} are wanted")
    if against:
        finding += f": {', and '.join(against)} (evaluation.probes)"
    return GateCheck(kind="probe", passed=not against, finding=finding)


def _check_gain(
    name: str, change: Delta, gate: GateConfig, rival: str, setting: str, least: float, floor: float
) -> GateCheck:
    """Say what was gained over a rival, and what speaks against it."""
    gain = METRICS[name].gain(change.value)
    low, high = METRICS[name].gains(change.ci_low, change.ci_high)
    measured = f"{name} gained {gain + 0.0:.4g} over {rival} (interval {low + 0.0:.4g} to {high + 0.0:.4g})"
    against = []
    if not gain > least:
        against.append(f"more than registry.gate.{setting} = {least:g} is wanted")
    if gate.require_significance:
        if not low > floor:
            against.append(f"the interval does not exclude {f'{floor:g}' if floor else 'zero'}")
        elif floor == 0 and not change.is_beyond_chance:
            against.append(f"chance could explain it (p = {change.p_value:.2g} in a randomization test)")
    finding = f"{measured}: {', and '.join(against)}" if against else measured
    return GateCheck(kind="gain", passed=not against, finding=finding)


def _check_guard(name: str, change: Delta, margin: float, rival: str) -> GateCheck:
    """Say whether a guard held: its loss, at the worse end of the interval, is within the margin."""
    metric = METRICS[name]
    worst = -metric.gains(change.ci_low, change.ci_high)[0]
    passed = worst <= margin
    finding = (
        f"{name} against {rival}: changed by {change.change} (interval {change.interval}); "
        f"a loss of up to {margin:g} is tolerated"
    )
    if not passed:
        is_lost = -metric.gain(change.value) > margin
        lost = "it got worse" if is_lost else f"these rows leave a loss of {worst:.4g} open"
        finding += f": {lost} (registry.gate.guards)"
    return GateCheck(kind="guard", passed=passed, finding=finding)
