import re
from typing import Any

import pytest

from schemas.artifacts import ChampionReport, Delta, ProbeReport
from schemas.config import GateConfig, ProbeConfig
from tasks.evaluation import gate as gate_module
from tasks.evaluation.metrics import MetricError

_STILL = Delta(value=0.0, ci_low=0.0, ci_high=0.0)
_GUARDS = {"repetition_rate": _STILL, "empty_answers": _STILL, "chrf": _STILL}


def judge(
    delta: dict[str, Delta], gate: GateConfig, champion: ChampionReport | None = None, *, num_conversations: int = 40
) -> tuple[str, tuple[str, ...]]:
    """Judge with guards that hold where the test names none."""
    decision = gate_module.judge({**_GUARDS, **delta}, gate, champion, num_conversations=num_conversations)
    return decision.verdict, decision.reasons


def _judge(gate: GateConfig, value: float, low: float, high: float) -> str:
    return judge({gate.metric: Delta(value=value, ci_low=low, ci_high=high)}, gate)[0]


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.30, 0.20, 0.40, "promoted"),
        (0.10, 0.05, 0.15, "refused"),  # not more than min_gain
        (0.30, -0.01, 0.60, "refused"),  # the interval includes zero
        (0.30, 0.0, 0.60, "refused"),  # zero is included
        (-0.30, -0.40, -0.20, "refused"),  # worse
        (float("nan"), 0.1, 0.2, "refused"),
    ],
)
def test_higher_is_better(value: float, low: float, high: float, verdict: str) -> None:
    assert _judge(GateConfig(metric="exact_match", min_gain=0.1), value, low, high) == verdict


def test_lower_is_better_turns_the_sign() -> None:
    gate = GateConfig(metric="nll", min_gain=0.1)
    assert _judge(gate, -0.5, -0.6, -0.4) == "promoted"
    assert _judge(gate, 0.5, 0.4, 0.6) == "refused"


def test_a_tie_never_passes() -> None:
    assert _judge(GateConfig(metric="chrf", require_significance=False), 0.0, -1.0, 1.0) == "refused"


def test_significance_can_be_waived() -> None:
    assert _judge(GateConfig(metric="chrf", require_significance=False), 1.0, -1.0, 3.0) == "promoted"


def test_reasons_name_metric_gain_and_limit() -> None:
    _, reasons = judge({"nll": Delta(value=-0.05, ci_low=-0.2, ci_high=0.1)}, GateConfig(min_gain=0.1))
    assert reasons == (
        "nll gained 0.05 over the base model (interval -0.1 to 0.2): more than registry.gate.min_gain = 0.1 is wanted, "
        "and the interval does not exclude zero",
    )


_BETTER = {"nll": Delta(value=-0.5, ci_low=-0.6, ci_high=-0.4)}


def _against(value: float, low: float, high: float, *, num_examples: int = 40) -> ChampionReport:
    return ChampionReport(
        version="7",
        num_examples=num_examples,
        num_conversations=num_examples,
        num_seen=0,
        metrics={"nll": 1.0},
        delta={**_GUARDS, "nll": Delta(value=value, ci_low=low, ci_high=high)},
        notes=("another tokenizer",),
    )


@pytest.mark.parametrize(
    ("value", "low", "high", "least", "verdict"),
    [
        (-0.10, -0.15, -0.05, 0.0, "promoted"),
        (-0.10, -0.25, 0.05, 0.0, "refused"),  # chance could explain it
        (0.0, 0.0, 0.0, 0.0, "refused"),  # the same model again
        (0.10, 0.05, 0.15, 0.0, "refused"),  # worse than the champion
        (-0.10, -0.15, -0.05, 0.2, "refused"),  # not more than what is asked for
        (-0.30, -0.50, -0.10, 0.2, "promoted"),  # more than what is asked for, and certainly better
        (0.05, 0.01, 0.09, -0.1, "promoted"),  # worse, but certainly by less than is tolerated
        (0.05, -0.05, 0.15, -0.1, "refused"),  # may be worse by more than is tolerated
    ],
)
def test_the_champion_has_to_be_beaten_too(value: float, low: float, high: float, least: float, verdict: str) -> None:
    gate = GateConfig(metric="nll", min_gain_over_champion=least)
    assert judge(_BETTER, gate, _against(value, low, high))[0] == verdict


def test_what_may_lose_to_the_champion_need_not_differ_from_it() -> None:
    alike = _against(0.01, -0.02, 0.04)
    alike.delta["nll"] = alike.delta["nll"].model_copy(update={"p_value": 0.6})
    assert judge(_BETTER, GateConfig(metric="nll", min_gain_over_champion=-0.1), alike)[0] == "promoted"
    by_chance = _against(-0.10, -0.15, -0.05)
    by_chance.delta["nll"] = by_chance.delta["nll"].model_copy(update={"p_value": 0.6})
    assert judge(_BETTER, GateConfig(metric="nll"), by_chance)[0] == "refused"


def test_who_beats_the_champion_but_not_the_base_is_refused() -> None:
    worse = {"nll": Delta(value=0.5, ci_low=0.4, ci_high=0.6)}
    assert judge(worse, GateConfig(metric="nll"), _against(-0.1, -0.2, -0.05))[0] == "refused"


def test_reasons_name_both_comparisons() -> None:
    _, reasons = judge(_BETTER, GateConfig(metric="nll"), _against(-0.10, -0.15, -0.05))
    assert reasons == (
        "nll gained 0.5 over the base model (interval 0.4 to 0.6)",
        "nll gained 0.1 over champion version 7 (interval 0.05 to 0.15)",
    )


def test_a_champion_that_cannot_be_compared_stays() -> None:
    verdict, reasons = judge(_BETTER, GateConfig(metric="nll"), _against(0.0, 0.0, 0.0, num_examples=0))
    assert verdict == "refused"
    assert reasons == (
        "champion version 7 could not be compared (another tokenizer): it stays until somebody promotes another "
        "version by hand",
    )


def test_two_held_out_rows_promote_nothing() -> None:
    verdict, reasons = judge(_BETTER, GateConfig(metric="nll"), num_conversations=2)
    assert verdict == "refused"
    assert reasons == (
        "2 held-out conversations to compare with the base model: at least registry.gate.min_conversations = 30 are "
        "wanted: hold out more (data.eval_fraction, data.eval_source, evaluation.max_examples)",
    )
    assert judge(_BETTER, GateConfig(metric="nll", min_conversations=2), num_conversations=2)[0] == "promoted"
    assert judge(_BETTER, GateConfig(metric="nll"), num_conversations=30)[0] == "promoted"
    assert judge(_BETTER, GateConfig(metric="nll"), num_conversations=29)[0] == "refused"


def test_the_champion_too_is_met_on_enough_conversations() -> None:
    verdict, reasons = judge(_BETTER, GateConfig(metric="nll"), _against(-0.1, -0.15, -0.05, num_examples=12))
    assert verdict == "refused"
    assert reasons[0].startswith("12 held-out conversations to compare with champion version 7: at least")


@pytest.mark.parametrize(
    ("name", "value", "low", "high", "verdict"),
    [
        ("repetition_rate", 0.69, 0.6, 0.72, "refused"),  # it loops
        ("repetition_rate", 0.01, -0.08, 0.1, "promoted"),  # certainly within the margin of 0.1
        ("repetition_rate", 0.01, -0.09, 0.11, "refused"),  # may be beyond it
        ("repetition_rate", -0.5, -0.6, -0.4, "promoted"),
        ("empty_answers", 0.2, 0.1, 0.3, "refused"),
        ("chrf", -9.0, -12.0, -6.0, "refused"),
        ("chrf", -2.0, -5.0, 1.0, "promoted"),
        ("chrf", 30.0, 20.0, 40.0, "promoted"),
    ],
)
def test_no_guard_may_get_worse_beyond_its_margin(
    name: str, value: float, low: float, high: float, verdict: str
) -> None:
    change = {name: Delta(value=value, ci_low=low, ci_high=high)}
    assert judge({**_BETTER, **change}, GateConfig(metric="nll"))[0] == verdict
    assert judge({**_BETTER, **change}, GateConfig(metric="nll", guards={name: None}))[0] == "promoted"
    assert judge({**_BETTER, **change}, GateConfig(metric="nll", guards={name: 100.0}))[0] == "promoted"
    champion = _against(-0.1, -0.15, -0.05)
    champion.delta[name] = change[name]
    assert judge(_BETTER, GateConfig(metric="nll"), champion)[0] == verdict


def test_a_guard_says_by_how_much_it_was_broken() -> None:
    change = {"repetition_rate": Delta(value=0.69, ci_low=0.6, ci_high=0.72)}
    assert judge({**_BETTER, **change}, GateConfig(metric="nll"))[1] == (
        "repetition_rate against the base model: changed by +0.69 (interval +0.6 to +0.72); a loss of up to 0.1 is "
        "tolerated: it got worse (registry.gate.guards)",
    )


def test_a_guard_that_is_broken_by_the_interval_alone_says_so() -> None:
    change = {"chrf": Delta(value=-2.233, ci_low=-6.819, ci_high=0.0)}
    assert judge({**_BETTER, **change}, GateConfig(metric="nll"))[1] == (
        "chrf against the base model: changed by -2.233 (interval -6.819 to 0); a loss of up to 5 is tolerated: these "
        "rows leave a loss of 6.819 open (registry.gate.guards)",
    )


def test_what_has_to_gain_is_no_guard() -> None:
    assert "chrf" not in gate_module.find_margins(GateConfig(metric="chrf"))
    assert gate_module.find_margins(GateConfig(guards={"rouge_l": 0.1, "chrf": None})) == {
        "rouge_l": 0.1,
        "repetition_rate": 0.1,
        "empty_answers": 0.1,
    }


def test_a_gain_that_chance_explains_once_several_metrics_are_counted_is_refused() -> None:
    gate = GateConfig(metric="nll", further_metrics=("exact_match", "rouge_l"))
    unsure = Delta(value=0.1, ci_low=0.01, ci_high=0.2, p_value=0.09)
    nothing = Delta(value=0.0, ci_low=-0.1, ci_high=0.1, p_value=1.0)
    verdict, reasons = judge({"nll": nothing, "exact_match": unsure, "rouge_l": nothing}, gate)
    assert verdict == "refused"
    assert "chance could explain it (p = 0.09 in a randomization test)" in reasons[1]
    sure = unsure.model_copy(update={"p_value": 0.04})
    verdict, reasons = judge({"nll": nothing, "exact_match": sure, "rouge_l": nothing}, gate)
    assert (verdict, len(reasons)) == ("promoted", 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "vibes"}, "registry.gate.metric = 'vibes': no such metric to judge by; known are exact_match, "),
        ({"further_metrics": ("vibes",)}, "registry.gate.further_metrics = 'vibes'"),
        ({"guards": {"vibes": 1.0}}, "registry.gate.guards = 'vibes'"),
        ({"metric": "answer_tokens"}, "registry.gate = 'answer_tokens'"),
    ],
)
def test_settings_name_metrics_of_the_table(settings: dict[str, Any], words: str) -> None:
    gate_module.check_settings(GateConfig())
    with pytest.raises(MetricError, match=re.escape(words)):
        gate_module.check_settings(GateConfig(**settings))


def test_probes_name_metrics_of_the_table_too() -> None:
    probe = ProbeConfig(name="text", source="x", max_loss=1.0, metric="vibes")
    with pytest.raises(MetricError, match=re.escape("evaluation.probes.0.metric = 'vibes'")):
        gate_module.check_settings(GateConfig(), [probe])


def _probe(value: float, low: float, high: float, *, num_conversations: int = 40) -> ProbeReport:
    delta = Delta(value=value, ci_low=low, ci_high=high)
    return ProbeReport(
        name="text",
        metric="nll",
        max_loss=0.5,
        num_conversations=num_conversations,
        before=0.1,
        after=0.1 + value,
        delta=delta,
    )


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (_probe(0.2, 0.1, 0.5), ""),
        (_probe(-0.2, -0.3, -0.1), ""),
        (_probe(0.9, 0.7, 1.1), "a loss of up to 0.5 is tolerated: it was forgotten (evaluation.probes)"),
        (_probe(0.3, 0.0, 0.6), "these rows leave open whether more was forgotten"),
        (_probe(0.0, 0.0, 0.0, num_conversations=2), "at least registry.gate.min_conversations = 30 are wanted"),
    ],
)
def test_what_the_base_model_does_well_must_still_be_done(probe: ProbeReport, words: str) -> None:
    decision = gate_module.judge({**_GUARDS, **_BETTER}, GateConfig(metric="nll"), num_conversations=40, probes=[probe])
    assert decision.checks[-1].finding.startswith("probe text: nll went from 0.1 to ")
    assert decision.verdict == ("refused" if words else "promoted")
    assert words in decision.checks[-1].finding


def test_a_decision_lists_all_that_was_looked_at() -> None:
    decision = gate_module.judge({**_GUARDS, **_BETTER}, GateConfig(metric="nll"), num_conversations=40)
    assert [(check.kind, check.passed) for check in decision.checks] == [
        ("conversations", True),
        ("gain", True),
        ("guard", True),
        ("guard", True),
        ("guard", True),
    ]
