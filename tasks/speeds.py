"""How long each stage took on this machine, a line each in `SFT_HOME/speeds.jsonl`: what a plan's times are made of.

A line is written where the work was done, by the door of the stage, and only of work that was done: not of what was
found in a cache. The file is a help and no record: it may be deleted.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from tasks import storage

logger = logging.getLogger(__name__)

FILE = "speeds.jsonl"
_MOST_BYTES = 4 << 20
"""Of the file; beyond it the older half goes."""
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
)


@dataclass(frozen=True)
class Speed:
    """One piece of work that was done here."""

    stage: str
    units: float
    """Rows, tokens or examples, as the stage counts its work."""
    seconds: float
    device: str
    shape: str = ""
    """Of the model; see `describe_shape`. Empty where it does not matter."""
    settings: str = ""
    """What else decides how long a unit takes, as canonical JSON."""
    engine: str = ""
    """That trained; of an evaluation, the kind of model: a base goes on where a trained one has come to its end."""
    flop_per_unit: float = 0.0
    """Useful work; 0 where it is not known."""
    peak_memory_bytes: int = 0
    """Of a training."""
    work: dict[str, float] = field(default_factory=dict)
    """Of a training's steps, what their time goes by (`tasks.training.pace`); lines of earlier releases have none."""


class Timing:
    """The clock of one piece of work."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._start

    def note(self, stage: str, units: float, **more: Any) -> None:
        """Write down that a stage's work is done."""
        note(Speed(stage, units, self.seconds, more.pop("device", "") or name_device(), **more))


def note(speed: Speed) -> None:
    """Add a line; what hinders that is logged and ends nothing."""
    try:
        path = storage.make_home() / FILE
        if path.is_file() and path.stat().st_size > _MOST_BYTES:
            _drop_older_half(path)
        with path.open("ab") as file:
            file.write((json.dumps(asdict(speed), separators=(",", ":")) + "\n").encode())
    except (OSError, storage.HomeError) as error:
        logger.warning("How long %s took is not noted for later plans: %s", speed.stage, error)


def read_speeds() -> list[Speed]:
    """Return what is noted, the oldest first; lines that are cut short are passed over.

    Lines of earlier releases have fewer fields, those of later ones may have more.
    """
    path = storage.home() / FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    known = {each.name for each in fields(Speed)}
    needed = {each.name for each in fields(Speed) if each.default is MISSING and each.default_factory is MISSING}
    speeds = []
    for line in lines:
        try:
            values = json.loads(line)
            if isinstance(values, dict) and needed <= set(values) and values["units"] > 0 and values["seconds"] > 0:
                speeds.append(Speed(**{name: value for name, value in values.items() if name in known}))
        except (ValueError, TypeError):
            continue
    return speeds


def write_settings(values: Mapping[str, Any]) -> str:
    """Return settings as a text that is the same for the same values."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def describe_shape(folder: Path) -> str:
    """Return what of a model decides its speed, by its config.json: the family and the sizes; empty without one."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    text = {**values, **(values.get("text_config") or {})}
    sizes = [f"{name}={text[name]}" for name in _SIZES if text.get(name) is not None]
    return " ".join([str(text.get("model_type", "")), *sizes])


@cache
def name_device() -> str:
    """Return the GPU's name, or the CPU's with the cores that this process may use."""
    import torch  # not at the top: the stages that only read do without

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_name_cpu()}, {cores} cores"


def _name_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def _drop_older_half(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(b"".join(lines[len(lines) // 2 :]))
    partial.replace(path)
