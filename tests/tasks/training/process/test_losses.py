"""Losses of a training are known to every later attempt, on this machine or another one."""

from dataclasses import replace
from pathlib import Path

from schemas.config import TrainingConfig
from tasks.training.process.losses import note_loss, read_losses
from tasks.training.process.messages import TrainingJob


def test_losses_come_along_to_another_machine_and_back(tmp_path: Path) -> None:
    job = TrainingJob(tmp_path, tmp_path, tmp_path / "one", TrainingConfig(), 5, "x", place=str(tmp_path / "shared"))
    other = replace(job, run_folder=tmp_path / "other")
    for machine in (job, other):
        machine.run_folder.mkdir()
        assert read_losses(machine) == ()
    note_loss(job, "lost a")
    note_loss(other, "lost b")
    assert read_losses(job) == read_losses(other) == ("lost a", "lost b")
    assert read_losses(replace(other, place=None)) == ("lost a", "lost b")
    assert read_losses(replace(job, place=None)) == ("lost a",)  # it was not there


def test_a_place_that_is_gone_takes_no_losses_along(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # where a folder should be
    job = TrainingJob(tmp_path, tmp_path, tmp_path, TrainingConfig(), 5, "x", place=str(tmp_path / "file" / "place"))
    note_loss(job, "lost a")
    assert read_losses(job) == ("lost a",)
