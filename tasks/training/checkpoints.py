"""Checkpoints that a killed training goes on from: whole or absent, verified, and of the same run only.

A checkpoint is a folder step-NNNNNN with what is trained and the optimizer's moments (safetensors), the progress and
the random states of every rank (JSON), and the sha256 of each file. Nothing in it is pickled, so reading one runs no
code. `writing.py` writes them beside the training.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.training.adamw import put_together, take_apart
from tasks.training.distributed import gather, rank
from tasks.training.random_states import read_random_states, seed_per_rank, write_random_states
from tasks.training.records import EvalRecord, TrainingError

logger = logging.getLogger(__name__)

TRAINED, OPTIMIZER, RANDOM = "trained.safetensors", "optimizer.safetensors", "random.safetensors"
STATE, DIGESTS = "state.json", "digests.json"


class CheckpointError(TrainingError):
    """A checkpoint belongs to another run, or cannot be written."""


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
    failure: str = ""
    """Why a candidate of a sweep was given up; it has no steps since."""
    warnings: list[str] = field(default_factory=list)
    """What befell the training up to here, over all attempts: damaged checkpoints, steps that did not fit."""

    @property
    def best_step(self) -> int | None:
        """Step of the smallest evaluation loss."""
        return max((record.step for record in self.evaluations if record.is_best), default=None)


@dataclass(frozen=True)
class Snapshot:
    """A training between two steps, copied to the host."""

    step: int
    best_step: int | None
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    states: dict[str, Tensor]
    """Random states of torch, as `rank|device`."""
    content: str
    """The JSON of identity, progress, and the random states of numpy and Python."""
    is_copied: torch.cuda.Event | None
    """On a GPU, reached when the copies are done: they are made beside the work that follows."""


def take_snapshot(
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: str,
) -> Snapshot | None:
    """Copy everything that a checkpoint holds: all ranks' random states, the rest from the leader; None elsewhere."""
    random_states = gather(read_random_states())
    if rank() > 0:
        return None
    trained = {name: _copy(parameter) for name, parameter in parameters.items()}
    moments = {name: _copy(tensor) for name, tensor in _list_moments(parameters, optimizer)}
    is_copied = None
    if any(parameter.is_cuda for parameter in parameters.values()):
        is_copied = torch.cuda.Event()
        is_copied.record()
    states: dict[str, Tensor] = {}
    generators: list[dict[str, Any]] = []
    for number, (tensors, values) in enumerate(random_states):
        states |= {f"{number}|{name}": tensor for name, tensor in tensors.items()}
        generators.append(values)
    content = {"identity": identity, "progress": asdict(progress), "generators": generators}
    return Snapshot(
        progress.step, progress.best_step, trained, moments, states, json.dumps(content), is_copied=is_copied
    )


def write_snapshot(snapshot: Snapshot, folder: Path, *, keep: int) -> Path:
    """Write a checkpoint atomically, then delete all but the last `keep` and the best.

    The files are written beside, flushed to the disk and renamed, so that a kill or a power cut at any moment leaves
    either the whole checkpoint or none.

    Returns:
        folder/step-NNNNNN.

    Raises:
        CheckpointError: it cannot be written; the ones before are as they were.
    """
    if snapshot.is_copied is not None:
        snapshot.is_copied.synchronize()
    final = name_checkpoint(folder, snapshot.step)
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(snapshot.trained, partial / TRAINED)
        save_file(snapshot.optimizer, partial / OPTIMIZER)
        save_file(snapshot.states, partial / RANDOM)
        (partial / STATE).write_text(snapshot.content, encoding="utf-8")
        digests = {name: _digest(partial / name) for name in (TRAINED, OPTIMIZER, RANDOM, STATE)}
        (partial / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        publish_folder(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        size = sum(t.nbytes for tensors in (snapshot.trained, snapshot.optimizer) for t in tensors.values())
        raise CheckpointError(
            f"{final}: this checkpoint cannot be written ({error}): it takes {size / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free there. The checkpoints before it are whole: make room and start again"
        ) from error
    _delete_old(folder, keep=keep, best_step=snapshot.best_step)
    return final


def find_checkpoint(folder: Path, identity: str, *, with_best: bool = False) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, if any, and a warning for each damaged one passed over.

    Args:
        folder: with the checkpoints of a run.
        identity: of the run.
        with_best: the best checkpoint up to there is wanted too in the end, and must be whole.

    Raises:
        CheckpointError: it belongs to a run with other data, config or base model.
    """
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    warnings: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        damage = find_damage(path) or (_find_best_damage(path) if with_best else None)
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
    trained, moments, state = read_checkpoint(path)
    assert parameters.keys() == trained.keys(), sorted(parameters.keys() ^ trained.keys())
    restore_part(trained, moments, parameters=parameters, optimizer=optimizer)
    values: dict[str, Any] = state["progress"]
    if rank() < len(state["generators"]):
        states = {name.removeprefix(f"{rank()}|"): tensor for name, tensor in load_file(path / RANDOM).items()}
        write_random_states(states, state["generators"][rank()])
    else:  # written by fewer ranks
        seed_per_rank(0, values["step"])
    return read_progress(values)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return what is trained, the optimizer's tensors, and what the JSON holds.

    Raises:
        CheckpointError: it is damaged.
    """
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return read_trained(path), load_file(path / OPTIMIZER), state


def restore_part(
    trained: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    *,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put back those of a checkpoint's tensors that belong to some parameters."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    own = {name: tensor for name, tensor in moments.items() if name.partition("|")[0] in parameters}
    _write_optimizer(parameters, optimizer, own)


def read_progress(values: dict[str, Any]) -> Progress:
    """Return a progress that was written as JSON."""
    return Progress(**{**values, "evaluations": [EvalRecord(**record) for record in values["evaluations"]]})


def read_trained(path: Path) -> dict[str, Tensor]:
    """Read what is trained out of a checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    if damage := find_damage(path):
        raise CheckpointError(
            f"{path}: this checkpoint is damaged ({damage}): start the run again, which goes on from an older one"
        )
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


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, oldest first."""
    steps = {step: path for path in folder.glob("step-*") if path.is_dir() and (step := read_step(path)) is not None}
    return [steps[step] for step in sorted(steps)]


def read_step(path: Path) -> int | None:
    """Return the step in a checkpoint's name; None for what is named otherwise."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def _delete_old(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the last `keep` and the best."""
    for path in list_checkpoints(folder)[:-keep]:
        if best_step is None or path != name_checkpoint(folder, best_step):
            shutil.rmtree(path)


def _digest(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None."""
    try:
        digests: dict[str, str] = json.loads((path / DIGESTS).read_text(encoding="utf-8"))
        changed = [name for name in (TRAINED, OPTIMIZER, RANDOM, STATE) if _digest(path / name) != digests.get(name)]
        if changed:
            return f"{', '.join(changed)} changed since it was written"
        step = json.loads((path / STATE).read_text(encoding="utf-8"))["progress"]["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None if step == read_step(path) else f"it holds step {step}"


def _find_best_damage(path: Path) -> str | None:
    """Return what is wrong with the best checkpoint that there was when a whole one was written, or None."""
    progress = json.loads((path / STATE).read_text(encoding="utf-8"))["progress"]
    best = max((record["step"] for record in progress["evaluations"] if record["is_best"]), default=None)
    if best is None or best == progress["step"]:
        return None
    damage = find_damage(name_checkpoint(path.parent, best))
    return damage and f"the best one before it, of step {best}, is damaged: {damage}"


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host: at once from the CPU; from a GPU in the order of its work, without waiting for it."""
    source = tensor.detach()
    if not source.is_cuda:
        return source.clone(memory_format=torch.contiguous_format)
    # Pinned memory is kept by PyTorch for the next snapshot: only the first one waits for its allocation.
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)


def _list_moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Return the optimizer's tensors by parameter name and key, such as `lora_A.weight|exp_avg`."""
    return [
        (f"{name}|{key}", tensor)
        for name, parameter in parameters.items()
        for entry, value in optimizer.state[parameter].items()
        for key, tensor in take_apart(entry, value)
    ]


def _write_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put the optimizer's tensors back, in the order in which it holds the parameters."""
    numbers = {name: number for number, name in enumerate(parameters)}
    found: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.partition("|")
        found.setdefault(numbers[name], {})[key] = tensor
    state = {number: put_together(entries) for number, entries in found.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
