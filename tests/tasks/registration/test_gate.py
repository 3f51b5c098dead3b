import pytest

from schemas.artifacts import Delta
from schemas.config import GateConfig
from tasks.registration.gate import judge


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
