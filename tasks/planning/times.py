"""How long a run takes, by what this machine noted of earlier ones; what it never did is unknown, and said so.

A training's steps go by their costs (`tasks.planning.costs`), of all earlier trainings on the device: those of the same
kind (engine, method, precision and what else changes a cost) where there are any, and those of the same model before
others. Lines of earlier releases say tokens and seconds alone; they are taken where there are no others.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tasks.planning.costs import OTHER_NOISE, SAME_NOISE, Seen, predict_steps
from tasks.planning.estimates import Estimate, predict, predict_rate
from tasks.speeds import Speed

_OTHER_SETTINGS, _OTHER_SHAPE = 1.5, 2.5
"""Factors by which the bar is widened: chosen, and not measured."""
_SEVERAL = 3
_MOST = 60
"""Trainings whose costs are looked at, the newest."""
_KIND = {
    **{"method": "lora", "use_dora": "False", "optimizer": "adamw", "precision": "auto", "base_weights": "full"},
    **{"num_processes": "1", "num_nodes": "1", "strategy": "ddp", "context_parallel": "1"},
    **{"objective": "sft", "sweep": "", "base_dropout": ""},
}
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


@dataclass(frozen=True)
class PlannedTraining:
    """A training whose time is asked for."""

    device: str
    """Its name."""
    is_gpu: bool
    shape: str
    """Of the model."""
    settings: str
    """That decide the pace."""
    engine: str
    """That will train."""
    tokens: Estimate
    """Over all steps, without padding."""
    work: Mapping[str, float]
    """Of all steps, with the sizes of the model; empty where these are not known."""
    flop_per_token: float
    """Useful work of the model; 0 where it is not known."""


def estimate_steps(speeds: Sequence[Speed], asked: PlannedTraining) -> tuple[Estimate | None, str]:
    """Return the seconds of a training's steps, and by what they are known.

    Args:
        speeds: of trainings' steps.
        asked: the training to come.
    """
    here = [speed for speed in speeds if speed.device == asked.device]
    known = [speed for speed in here if speed.work]
    if not known or not asked.work:
        return _estimate_by_pace(here, asked)
    kind = describe_kind(asked.settings, asked.engine)
    alike = [speed for speed in known if describe_kind(speed.settings, speed.engine) == kind]
    taken = (alike or known)[-_MOST:]
    own = [speed for speed in taken if speed.shape == asked.shape]
    seen = [Seen(speed.work, speed.seconds, SAME_NOISE if speed in own else OTHER_NOISE) for speed in taken]
    device = "cuda" if asked.is_gpu else "cpu"
    found = predict_steps(seen, asked.work, device=device, noise=SAME_NOISE if own else OTHER_NOISE)
    assert found is not None
    told = f"{_count(own)} of this model" if own else f"{_count(taken)} of other models"
    if not alike:
        found = found.widen(_OTHER_SETTINGS)
        told += f" with other {_name_difference(kind, taken)}"
    return _spread(found.scale(1 / asked.tokens.value), asked.tokens), told


def describe_kind(settings: str, engine: str) -> dict[str, str]:
    """Return what of a training's settings changes its costs in a way that no count of its work tells."""
    values = json.loads(settings) if settings else {}
    kind = {name: str(values.get(name, usual)) for name, usual in _KIND.items()}
    kind |= {name: str(bool(values.get(name))) for name in ("dropout", "modules_to_save")}
    return {**kind, "engine": engine}


def _name_difference(kind: Mapping[str, str], speeds: Sequence[Speed]) -> str:
    """Return the settings in which the nearest of earlier trainings differs."""
    others = [describe_kind(speed.settings, speed.engine) for speed in speeds]
    different = [[name for name, value in kind.items() if other[name] != value] for other in others]
    return ", ".join(sorted(different, key=len)[0])


def _estimate_by_pace(here: Sequence[Speed], asked: PlannedTraining) -> tuple[Estimate | None, str]:
    """Return the seconds by tokens alone; the nearest of the same settings, the same model, and other models."""
    tokens = asked.tokens
    same_shape = [speed for speed in here if speed.shape == asked.shape]
    same = [speed for speed in same_shape if speed.settings == asked.settings]
    if same:
        return _spread(predict_rate(_pairs(same), 1.0), tokens), f"{_count(same)} of this model with these settings"
    if same_shape:
        pace = predict_rate(_pairs(same_shape), 1.0)
        assert pace is not None
        text = f"{_count(same_shape)} of this model with other settings"
        return _spread(pace.widen(_OTHER_SETTINGS), tokens), text
    known = [speed for speed in here if speed.flop_per_unit]
    if known and asked.flop_per_token:
        work = [(speed.units * speed.flop_per_unit, speed.seconds) for speed in known[-_FEW:]]
        pace = predict_rate(work, asked.flop_per_token)
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
            # The scatter of several says itself how far apart they are.
            return seconds.widen(_OTHER_SETTINGS**step) if step and len(found) < _SEVERAL else seconds, _count(found)
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
