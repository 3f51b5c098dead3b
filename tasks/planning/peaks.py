"""The highest memory of a training, by what earlier ones of the same model took on this device.

    bytes = what the process held before + what the training's libraries take + weights, trained values and optimizer
            + logits + the larger of a step's and a held-out pass
    a step's pass = its tokens * (inputs of all layers + what the layers keep for the backward pass)
    a held-out pass = its tokens * what one layer computes

A long example that would not fit is made to: gated layers run in pieces of tokens, and layers' inputs lie in the host's
memory but for two that are on their way (`tasks.training.engines.long_examples`).

On a GPU, what the layers of a dense model with an adapter keep is counted too (`tasks.planning.kept`), so that no
earlier training is needed. All else is a fit like that of the time (`tasks.planning.costs`). What is counted to the
byte is taken as counted; what libraries take, and how much the layers of other models keep of a token, are measured. On
a CPU a training is a part of the run's process, which holds more than a trial's: it has evaluated the base model. What
earlier runs held before their trainings is noted.
Ranks that share a pass (`training.context_parallel`) each hold their part of its tokens.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from schemas.config import TrainingConfig
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.planning.costs import Floats, predict_sum
from tasks.planning.estimates import Estimate
from tasks.training.engines.choice import LEAN_LOGITS_BYTES, LONG_IN_TURN, LONG_PIECE

_LIBRARIES = {"cpu": 1.2e8, "cuda": 3e8}
"""Bytes that libraries take when they begin to compute; on a GPU, their work spaces."""
_BEFORE_TRAINING_BYTES = 90e6
"""That a run's process holds more than a trial's: of the demo, 92 MB, by Prefect's and MLflow's stores and the base
model's evaluation. Once a run was done here, its own figure is taken."""
_PRIORS = {
    "cpu": np.array([0.02, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.3]),  # an allocator keeps what loading a model took
    "cuda": np.array([0.02, 0.5, 0.02, 0.5, 0.5, 0.5, 0.5, 0.3]),
}
_COUNTED_PRIORS = np.array([0.02, 0.5, 0.02, 0.5, 0.1, 0.05, 0.5, 0.3])
"""Where a GPU's layers were counted (`tasks.planning.kept`)."""
_AT_WORK = 0.3
"""Of a layer's kept values: what its backward pass has beside them at a time. Trainings of a 0.6B and
a 7B shape had 0 to 0.5 of them."""
_NOISE = {"cpu": 0.02, "cuda": 0.01}
_FEW = 5
_PARTS_KEPT = (10, 2)
"""Values that a layer keeps of a token, of the hidden size and of the feed-forward's width: from what a
training of the 7B shape took: 65,000 values."""
_PARTS_HELD_OUT = (5, 3)
"""Values of a token that one layer has at a time where no gradient is taken."""
_LEAST_PART = 0.05
"""Of the bar: allocators round, and a process is never twice the same."""


@dataclass(frozen=True)
class Peak:
    """A training whose memory is known, or asked for."""

    fixed_bytes: int
    """Weights, trained values, gradient and optimizer."""
    itemsize: int
    """Bytes of a value in the forward pass."""
    rank: int
    """Of the adapter; 0 where there is none."""
    work: Mapping[str, float]
    """As `tasks.training.pace` notes it."""
    peak_bytes: int = 0
    """What was measured."""
    kept_bytes: float = 0.0
    """Of a token, that all layers together keep, counted; 0 where it was not counted."""


def foresee_resident(speeds: Sequence[Mapping[str, float]]) -> float:
    """Return the bytes that a run's process will hold before its training.

    Args:
        speeds: works of earlier trainings on this device, of any model, as noted; the oldest first.
    """
    of_runs = [work["resident"] for work in speeds if not work["trial"]][-_FEW:]
    if of_runs:
        return statistics.median(of_runs)
    of_trials = [work["resident"] for work in speeds][-_FEW:]
    return statistics.median(of_trials) + _BEFORE_TRAINING_BYTES if of_trials else 0.0


def predict_peak(seen: Sequence[Peak], asked: Peak, *, device: str) -> Estimate:
    """Predict the bytes; nothing was seen, the bar is wide.

    Args:
        seen: earlier trainings of the same model on this device.
        asked: the training to come.
        device: cpu or cuda.
    """
    priors, noise = _COUNTED_PRIORS if asked.kept_bytes else _PRIORS[device], _NOISE[device]
    terms = np.array([_list_terms(each, device) for each in seen]).reshape(len(seen), len(priors))
    totals = np.array([float(each.peak_bytes) for each in seen])
    noises = np.full(len(seen), noise)
    value, part = predict_sum(terms, totals, noises, _list_terms(asked, device), priors=priors, noise=noise)
    part = max(part, _LEAST_PART)
    return Estimate(value, value / (1 + part), value * (1 + part))


def fit_long(seen: Sequence[Peak], asked: Peak, *, room_bytes: float, host_bytes: float) -> Peak:
    """Return a GPU's training with what it does where its largest pass does not fit with every layer recomputed.

    Gated layers run in pieces, and where that is not enough, the inputs of as few layers as it takes lie in the host's
    memory; of as many as there is room for, where none is enough.

    Args:
        seen: earlier trainings of the same model on this device.
        asked: the training to come.
        room_bytes: of the device, that are planned for.
        host_bytes: that a rank may take of the host's memory.
    """
    work = asked.work
    tokens = work["largest_pass"] / work.get("sharing", 1.0)
    in_pieces = {"piece": float(LONG_PIECE) if tokens > LONG_PIECE else 0.0}
    most = min(int(work["layers"]) - 1, int(host_bytes / max(1.0, tokens * work["hidden"] * asked.itemsize)))
    ways = [{}, in_pieces, *({**in_pieces, "in_host": float(number)} for number in range(LONG_IN_TURN + 1, most + 1))]
    tried = asked
    for way in ways if work["recomputed"] == 1 else ():
        tried = replace(asked, work={**work, **way})
        if predict_peak(seen, tried, device="cuda").value <= room_bytes:
            break
    return tried


def count_rank(config: TrainingConfig) -> int:
    """Return the rank of the adapter; 0 without one."""
    return config.rank if config.is_lora else 0


def _list_terms(peak: Peak, device: str) -> Floats:
    """Return the parts [K] of the memory, as they would usually be."""
    work, size, is_gpu = peak.work, peak.itemsize, device == "cuda"
    tokens, layers, hidden = work["largest_pass"] / work.get("sharing", 1.0), work["layers"], work["hidden"]
    hidden_kept, width_kept = _PARTS_KEPT
    piece, in_host = work.get("piece", 0.0) or tokens, work.get("in_host", 0.0)
    a_layer = (tokens * hidden_kept * hidden + min(tokens, piece) * width_kept * work["width"]) * size
    on_device = layers - max(0.0, in_host - LONG_IN_TURN)
    kept = layers * (1 - work["recomputed"])
    inputs = tokens * on_device * hidden * size
    step = (inputs, (kept + 1) * a_layer, kept * tokens * 7 * peak.rank * size)
    if peak.kept_bytes and piece >= tokens:
        at_work = _AT_WORK + (work["recomputed"] > 0)
        step = (inputs * work["recomputed"], (kept + at_work) * tokens * peak.kept_bytes / layers, 0.0)
    # On a CPU no pass is larger than a step's, and logits are small beside what an allocator keeps.
    most_logits = (LEAN_LOGITS_BYTES if work["recomputed"] else LOGITS_BYTES) if is_gpu else 0
    hidden_held, width_held = _PARTS_HELD_OUT
    held_out = work.get("held_out_pass", 0.0) * (hidden_held * hidden + width_held * work["width"]) * size
    held_out = held_out if is_gpu and held_out > sum(step) else 0.0
    return np.array(
        [
            0.0 if is_gpu else work["resident"],
            _LIBRARIES[device],
            float(peak.fixed_bytes),
            min(most_logits, tokens * work["vocabulary"] * size),
            *((0.0, 0.0, 0.0) if held_out else step),
            held_out,
        ]
    )
