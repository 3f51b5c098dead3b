import pytest

from schemas.artifacts import ChampionReport, Delta
from schemas.config import GateConfig
from tasks.registry.gate import judge


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
    assert len(reasons) == 2
    assert "nll gained 0.05" in reasons[0]
    assert "registry.gate.min_gain = 0.1" in reasons[0]
    assert "does not exclude zero" in reasons[1]


_BETTER = {"nll": Delta(value=-0.5, ci_low=-0.6, ci_high=-0.4)}


def _against(value: float, low: float, high: float, *, num_examples: int = 40) -> ChampionReport:
    return ChampionReport(
        version="7",
        num_examples=num_examples,
        num_seen=0,
        metrics={"nll": 1.0},
        delta={"nll": Delta(value=value, ci_low=low, ci_high=high)},
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
        (0.05, 0.01, 0.09, -0.1, "promoted"),  # worse, but certainly by less than is tolerated
        (0.05, -0.05, 0.15, -0.1, "refused"),  # may be worse by more than is tolerated
    ],
)
def test_the_champion_has_to_be_beaten_too(value: float, low: float, high: float, least: float, verdict: str) -> None:
    gate = GateConfig(metric="nll", min_gain_over_champion=least)
    assert judge(_BETTER, gate, _against(value, low, high))[0] == verdict


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
