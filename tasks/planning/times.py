"""How long a run takes, by what this machine noted of earlier ones; what it never did is unknown, and said so.

Four steps from certain to vague, the first that has anything noted is taken: the same model, settings and device; the
same model and device; a model of the same engine on the device, by its useful work a token; nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.planning.estimates import Estimate, predict, predict_rate
from tasks.speeds import Speed

_OTHER_SETTINGS, _OTHER_SHAPE = 1.5, 2.5
"""Factors by which the bar is widened: chosen, and not measured."""
_FEW = 20
"""The newest of a kind are taken: libraries and drivers change."""


@dataclass(frozen=True)
class StageTime:
    """What is known of a stage's time."""

    stage: str
    seconds: Estimate | None
    """None where nothing like it was done here."""
    source: str
    """By what it is known: cached, earlier runs, or why it is not."""


def estimate_steps(
    speeds: Sequence[Speed], *, tokens: Estimate, device: str, shape: str, settings: str, flop_per_token: float
) -> tuple[Estimate | None, str]:
    """Return the seconds of a training's steps, and by what they are known.

    Args:
        speeds: of trainings' steps.
        tokens: over all steps.
        device: that trains.
        shape: of the model.
        settings: that decide the pace.
        flop_per_token: useful work of the model; 0 where it is not known.
    """
    here = [speed for speed in speeds if speed.device == device]
    same_shape = [speed for speed in here if speed.shape == shape]
    same = [speed for speed in same_shape if speed.settings == settings]
    if same:
        return _spread(predict_rate(_pairs(same), 1.0), tokens), f"{_count(same)} of this model with these settings"
    if same_shape:
        pace = predict_rate(_pairs(same_shape), 1.0)
        assert pace is not None
        text = f"{_count(same_shape)} of this model with other settings"
        return _spread(pace.widen(_OTHER_SETTINGS), tokens), text
    known = [speed for speed in here if speed.flop_per_unit]
    if known and flop_per_token:
        work = [(speed.units * speed.flop_per_unit, speed.seconds) for speed in known[-_FEW:]]
        pace = predict_rate(work, flop_per_token)
        assert pace is not None
        return _spread(pace.widen(_OTHER_SHAPE), tokens), f"{_count(known)} of other models, by the work a token"
    return None, "no training was measured on this machine yet"


def estimate_stage(
    speeds: Sequence[Speed], units: float, *, matches: Sequence[Callable[[Speed], bool]]
) -> tuple[Estimate | None, str]:
    """Return the seconds of another stage, and by what they are known.

    Args:
        speeds: of this stage.
        units: of its work.
        matches: tells which of them are like this one, the strictest first; each step away from it widens the bar.
    """
    for step, match in enumerate(matches):
        found = [speed for speed in speeds if match(speed)]
        if found:
            seconds = predict(_pairs(found), units)
            assert seconds is not None
            return seconds.widen(_OTHER_SETTINGS**step) if step else seconds, _count(found)
    return None, "nothing like it was done on this machine yet"


def add_up(times: Sequence[StageTime]) -> Estimate | None:
    """Return the seconds of all stages; None where those of one are unknown."""
    total = Estimate(0.0, 0.0, 0.0)
    for time in times:
        if time.seconds is None:
            return None
        total = total + time.seconds
    return total


def _pairs(speeds: Sequence[Speed]) -> list[tuple[float, float]]:
    return [(speed.units, speed.seconds) for speed in speeds[-_FEW:]]


def _spread(pace: Estimate | None, tokens: Estimate) -> Estimate | None:
    """Return pace times tokens, with the bars of both."""
    if pace is None:
        return None
    value = pace.value * tokens.value
    return Estimate(value, pace.low * tokens.low, pace.high * tokens.high)


def _count(speeds: Sequence[Speed]) -> str:
    number = min(len(speeds), _FEW)
    return f"{number} earlier run{'s' if number > 1 else ''}"
