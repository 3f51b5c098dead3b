"""Checkpoints written beside the training: in order, whole, and never silently missing."""

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tasks.training.checkpoints import CheckpointError, Progress, Snapshot, find_checkpoint, take_snapshot
from tasks.training.writing import CheckpointWriter


def snapshot(step: int, *, size: int = 16) -> Snapshot:
    parameters = {"a": nn.Parameter(torch.full((size,), float(step)))}
    optimizer = torch.optim.AdamW(list(parameters.values()))
    taken = take_snapshot(parameters=parameters, optimizer=optimizer, progress=Progress(step=step), identity="x")
    assert taken is not None
    with torch.no_grad():
        parameters["a"].fill_(-1.0)  # what the training does next is not in it
    return taken


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let no file grow beyond the limit: a write then fails as on a full disk."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # as Python starts: an error, and no death
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_now(writer: CheckpointWriter, taken: Snapshot) -> None:
    writer.write(taken)
    writer.finish()


def check_often(writer: CheckpointWriter) -> None:
    for _ in range(1000):
        writer.check()
        time.sleep(0.01)


def train_once(folder: Path, error: Exception | None) -> None:
    with CheckpointWriter(folder, keep=1) as writer:
        writer.write(snapshot(1))
        if error is not None:
            raise error


def test_written_beside_and_in_order(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in (1, 2, 3):
            writer.write(snapshot(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    assert load_file(tmp_path / "step-000003" / "trained.safetensors")["a"].tolist() == [3.0] * 16


def test_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    size = 1 << 20
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.write(snapshot(1))
        writer.finish()
        large = snapshot(2, size=size)
        with small_files(size), pytest.raises(CheckpointError, match=r"step-000002: .* cannot be written.*4\.2 MB"):
            write_now(writer, large)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
        assert find_checkpoint(tmp_path, "x") == (tmp_path / "step-000001", [])


def test_error_surfaces_at_the_next_step(tmp_path: Path) -> None:
    file = tmp_path / "a file where a folder is wanted"
    file.write_text("")
    writer = CheckpointWriter(file, keep=1)
    writer.check()
    writer.write(snapshot(1))
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_often(writer)
    writer.check()  # told once


def test_error_at_the_end_is_not_lost_and_hides_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a file where a folder is wanted"
    file.write_text("")
    with pytest.raises(CheckpointError):
        train_once(file, None)
    with pytest.raises(KeyError):
        train_once(file, KeyError())
