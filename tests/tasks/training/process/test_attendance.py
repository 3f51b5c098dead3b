"""What a launcher says of who trains together, and when it gives up."""

import logging

import pytest

from tasks.training.process.attendance import Attendance
from tasks.training.process.failures import shorten_message
from tasks.training.records import TrainingCrash

Lines = list[tuple[int, str]]


def attend(lines: Lines, most_failures: int = 6, losses: list[str] | None = None) -> Attendance:
    kept = [] if losses is None else losses
    return Attendance(lambda level, text: lines.append((level, text)), most_failures, on_loss=kept.append)


def test_changes_are_told_and_losses_are_kept_as_warnings() -> None:
    lines: Lines = []
    losses: list[str] = []
    team = attend(lines, losses=losses)
    team.note_round(["a", "b", "b"], 6)
    team.note_step(7)
    team.note_failure("RuntimeError: reset by peer")
    team.note_failure("no word")
    team.note_round(["a", "b"], 4)
    team.note_step(9)
    team.note_round(["a", "b", "c"], 6)
    team.note_step(10)
    team.note_failure("no word")
    team.note_round(["c", "b", "a"], 6)
    assert lines == [
        (logging.INFO, "Training on 3 machines with 6 processes: a, b (2)"),
        (logging.WARNING, "Lost b after step 7: 2 machines with 4 processes go on from the last checkpoint"),
        (logging.INFO, "c came after step 9: 3 machines with 6 processes go on"),
        (
            logging.WARNING,
            "A process was lost after step 10 (no word): 3 machines with 6 processes go on from the last checkpoint",
        ),
    ]
    assert losses == [text for level, text in lines if level == logging.WARNING]


def test_losses_without_a_step_between_them_come_to_an_end() -> None:
    team = attend([], most_failures=3)
    team.note_round(["a"], 1)
    for _ in range(10):  # steps are done in between: it may go on for ever
        team.note_step(1)
        team.note_failure("no word")
        team.note_round(["a"], 1)
    for _ in range(10):  # others come before the first step: nothing failed
        team.note_round(["a", "b"], 2)
    team.note_failure("no word")
    team.note_round(["a"], 1)
    team.note_failure("RuntimeError: out of order")
    with pytest.raises(TrainingCrash, match=r"began 3 times from step 1 .* RuntimeError: out of order"):
        team.note_round(["a"], 1)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "[/__w/pytorch/third_party/gloo/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:47794. "
            "This is typically caused by a remote worker crashing. Check the logs",
            "Connection closed by peer [127.0.0.1]:47794",
        ),
        ("out of order\nat step 3", "out of order"),
        ("", ""),
        ("word " * 50, " ".join(["word"] * 40) + " …"),
    ],
)
def test_an_error_of_a_process_is_told_by_its_first_sentence(message: str, shown: str) -> None:
    assert shorten_message(message) == shown
