import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tasks.training.checkpoints import (
    CheckpointError,
    Progress,
    find_checkpoint,
    publish_folder,
    read_trained,
    restore_checkpoint,
    take_snapshot,
    write_snapshot,
)
from tasks.training.records import EvalRecord


def make_state(seed: int = 0) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Two parameters and an AdamW that has moved them once."""
    torch.manual_seed(seed)
    parameters = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(5))}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.1, fused=True)
    step_once(parameters, optimizer)
    return parameters, optimizer


def step_once(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    torch.stack([(p * torch.randn_like(p)).sum() for p in parameters.values()]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def evaluate(step: int, loss: float, *, is_best: bool) -> EvalRecord:
    return EvalRecord(step=step, num_steps=9, epoch=0.5, loss=loss, train_loss=1.0, is_best=is_best)


def save(folder: Path, step: int, *, keep: int = 2, evaluations: list[EvalRecord] | None = None) -> Path:
    parameters, optimizer = make_state(step)
    progress = Progress(step=step, losses=[0.5] * step, evaluations=evaluations or [])
    snapshot = take_snapshot(parameters=parameters, optimizer=optimizer, progress=progress, identity="this run")
    assert snapshot is not None
    return write_snapshot(snapshot, folder, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back(tmp_path: Path) -> None:
    parameters, optimizer = make_state()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0.0, 1.0)  # leaves half a pair behind, which is part of the state
    np.random.standard_normal()
    evaluations = [evaluate(1, 2.5, is_best=True)]
    progress = Progress(1, [3.25], evaluations, num_tokens=7, num_trained_tokens=4, train_seconds=0.5)
    snapshot = take_snapshot(parameters=parameters, optimizer=optimizer, progress=progress, identity="x")
    assert snapshot is not None
    draws = (random.gauss(0.0, 1.0), random.random(), np.random.standard_normal(2).tolist(), torch.randn(3).tolist())
    step_once(parameters, optimizer)  # what was taken before does not change any more
    path = write_snapshot(snapshot, tmp_path, keep=1)

    others, other_optimizer = make_state(seed=99)
    assert restore_checkpoint(path, parameters=others, optimizer=other_optimizer) == progress
    again = (random.gauss(0.0, 1.0), random.random(), np.random.standard_normal(2).tolist(), torch.randn(3).tolist())
    assert again == draws
    step_once(others, other_optimizer)
    assert all(torch.equal(others[name], parameters[name]) for name in parameters)


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    flush = os.fsync

    def note(descriptor: int) -> None:
        if not (tmp_path / "step-000001").exists():
            flushed.add(os.fstat(descriptor).st_ino)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    path = save(tmp_path, 1)
    assert {file.stat().st_ino for file in (path, *path.iterdir())} <= flushed


def test_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    best = [evaluate(2, 1.0, is_best=True)]
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=2, evaluations=best if step >= 2 else [])
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]


def test_newest_whole_one_is_found(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 1_000_000)
    assert find_checkpoint(tmp_path, "this run") == (tmp_path / "step-1000000", [])
    assert find_checkpoint(tmp_path / "nothing here", "this run") == (None, [])


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_damaged_one_is_passed_over_with_a_warning(tmp_path: Path, name: str) -> None:
    save(tmp_path, 3)
    file = save(tmp_path, 6) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    path, warnings = find_checkpoint(tmp_path, "this run")
    assert path == tmp_path / "step-000003"
    assert len(warnings) == 1
    assert "step-000006 is damaged" in warnings[0]
    assert name in warnings[0]


@pytest.mark.parametrize("name", ["trained.safetensors", "digests.json"])
def test_missing_file_is_damage(tmp_path: Path, name: str) -> None:
    (save(tmp_path, 3) / name).unlink()
    path, warnings = find_checkpoint(tmp_path, "this run")
    assert path is None
    assert name in warnings[0]


def test_kill_while_writing_leaves_the_older_one(tmp_path: Path) -> None:
    save(tmp_path, 3)
    half = tmp_path / ".partial-step-000006"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path, "this run") == (tmp_path / "step-000003", [])
    assert names(tmp_path) == ["step-000003"]


def test_another_run_is_refused_naming_both(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"step-000003.*identity this run.*now give another run") as caught:
        find_checkpoint(tmp_path, "another run")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    files = names(save(tmp_path, 3))
    assert files == ["digests.json", "optimizer.safetensors", "random.safetensors", "state.json", "trained.safetensors"]
    assert read_trained(tmp_path / "step-000003").keys() == {"a", "b"}


def test_publishing_replaces_a_folder(tmp_path: Path) -> None:
    for text in ("old", "new"):
        (tmp_path / "partial").mkdir()
        (tmp_path / "partial" / text).write_text(text)
        publish_folder(tmp_path / "partial", tmp_path / "final")
    assert names(tmp_path) == ["final"]
    assert names(tmp_path / "final") == ["new"]
