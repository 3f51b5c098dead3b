"""Checkpoints that a killed training goes on from: whole or absent, verified, and of the same run only.

A checkpoint is a folder step-NNNNNN with what is trained and the optimizer's moments (safetensors), the progress and
the random states (JSON), and the sha256 of each file. Nothing in it is pickled, so reading one runs no code.
"""

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.training.records import EvalRecord, TrainingError

logger = logging.getLogger(__name__)

TRAINED, OPTIMIZER, RANDOM = "trained.safetensors", "optimizer.safetensors", "random.safetensors"
STATE, DIGESTS = "state.json", "digests.json"


class CheckpointError(TrainingError):
    """A checkpoint belongs to another run."""


@dataclass
class Progress:
    """How far a training is; with seed and data, all that the order of examples and the learning rate depend on."""

    step: int = 0
    """Optimizer steps done: also the position in the data."""
    losses: list[float] = field(default_factory=list)
    """One a step."""
    evaluations: list[EvalRecord] = field(default_factory=list)
    num_tokens: int = 0
    num_trained_tokens: int = 0
    train_seconds: float = 0.0

    @property
    def best_step(self) -> int | None:
        """Step of the smallest evaluation loss."""
        return max((record.step for record in self.evaluations if record.is_best), default=None)


def save_checkpoint(
    folder: Path,
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: str,
    keep: int,
) -> Path:
    """Write a checkpoint atomically, then delete all but the last `keep` and the best.

    The files are written beside, flushed to the disk and renamed, so that a kill or a power cut at any moment leaves
    either the whole checkpoint or none.

    Returns:
        folder/step-NNNNNN.
    """
    final = name_checkpoint(folder, progress.step)
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, partial / TRAINED)
    save_file(_read_optimizer(parameters, optimizer), partial / OPTIMIZER)
    states, generators = _read_random_states()
    save_file(states, partial / RANDOM)
    state = {"identity": identity, "progress": asdict(progress), "generators": generators}
    (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
    digests = {name: _digest(partial / name) for name in (TRAINED, OPTIMIZER, RANDOM, STATE)}
    (partial / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
    publish_folder(partial, final)
    _delete_old(folder, keep=keep, best_step=progress.best_step)
    return final


def find_checkpoint(folder: Path, identity: str) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, if any, and a warning for each damaged one passed over.

    Raises:
        CheckpointError: it belongs to a run with other data, config or base model.
    """
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    warnings: list[str] = []
    for path in reversed(_list_checkpoints(folder)):
        damage = _find_damage(path)
        if damage:
            warnings.append(f"checkpoint {path.name} is damaged ({damage}) and was passed over for an older one")
            logger.warning("%s: %s", path, warnings[-1])
            continue
        found = json.loads((path / STATE).read_text(encoding="utf-8"))["identity"]
        if found != identity:
            raise CheckpointError(
                f"{path}: this checkpoint was written by a run with identity {found}, but data, config and base model "
                f"now give {identity}: undo the change to resume, or start a new run in another folder"
            )
        return path, warnings
    return None, warnings


def restore_checkpoint(
    path: Path, *, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Progress:
    """Put back what is trained, the optimizer's moments and the random states; return the progress."""
    trained = read_trained(path)
    assert parameters.keys() == trained.keys(), sorted(parameters.keys() ^ trained.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    _write_optimizer(parameters, optimizer, load_file(path / OPTIMIZER))
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    _write_random_states(load_file(path / RANDOM), state["generators"])
    values: dict[str, Any] = state["progress"]
    return Progress(**{**values, "evaluations": [EvalRecord(**record) for record in values["evaluations"]]})


def read_trained(path: Path) -> dict[str, Tensor]:
    """Read what is trained out of a checkpoint."""
    return load_file(path / TRAINED)


def name_checkpoint(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step-{step:06d}"


def publish_folder(partial: Path, final: Path) -> None:
    """Flush a finished folder to the disk and give it its final name in one move."""
    for path in partial.rglob("*"):
        if path.is_file():
            _flush(path)
    _flush(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), key=lambda p: int(p.name.removeprefix("step-")))


def _delete_old(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the last `keep` and the best."""
    for path in _list_checkpoints(folder)[:-keep]:
        if best_step is None or path != name_checkpoint(folder, best_step):
            shutil.rmtree(path)


def _digest(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None."""
    try:
        digests: dict[str, str] = json.loads((path / DIGESTS).read_text(encoding="utf-8"))
        changed = [name for name in (TRAINED, OPTIMIZER, RANDOM, STATE) if _digest(path / name) != digests.get(name)]
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return f"{', '.join(changed)} changed since it was written" if changed else None


def _read_optimizer(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors by parameter name and key, such as `lora_A.weight|exp_avg`."""
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def _write_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put the optimizer's tensors back, in the order in which it holds the parameters."""
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("|", 1)
        state.setdefault(numbers[name], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return torch's states as tensors, and those of Python and numpy as JSON values."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    legacy: Any = np.random.get_state(legacy=False)
    legacy["state"]["key"] = legacy["state"]["key"].tolist()
    return states, {"python": random.getstate(), "numpy": legacy}


def _write_random_states(states: Mapping[str, Tensor], generators: Mapping[str, Any]) -> None:
    """Put the random states back; those of GPUs that are not here are left out."""
    torch.set_rng_state(states["torch"])
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{number}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{number}"], number)
    version, words, gauss = generators["python"]
    random.setstate((version, tuple(words), gauss))
    legacy = dict(generators["numpy"])
    legacy["state"] = {**legacy["state"], "key": np.array(legacy["state"]["key"], np.uint32)}
    np.random.set_state(legacy)
