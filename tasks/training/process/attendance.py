"""Who trains together, round after round: what a launcher makes of it when machines or processes come and go."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from schemas.plurals import count_of
from tasks.training.records import TrainingCrash

MOST_FAILURES = 6
"""In a row, without a step between them, of the launcher that leads."""
MOST_FAILURES_AS_GUEST = 3
"""Of a machine that has joined: it may be the one that is broken, and must give up before the others do."""


@dataclass
class Attendance:
    """The team as its members last told of it; its changes become sentences, for people."""

    on_log: Callable[[int, str], None]
    most_failures: int = MOST_FAILURES
    machines: Counter[str] | None = None
    on_loss: Callable[[str], None] = lambda sentence: None
    """Gets what stands among the training's warnings."""
    last_step: int = 0
    cause: str | None = None
    """Why the round before ended, if something failed in it."""
    num_failures: int = 0

    def note_round(self, machines: Sequence[str], num_processes: int) -> None:
        """Take note of who begins, and say what has changed.

        Raises:
            TrainingCrash: it began again and again, and no step was done.
        """
        before, now = self.machines, Counter(machines)
        self.machines = now
        size = f"{count_of(now.total(), 'machine')} with {count_of(num_processes, 'process', 'processes')}"
        if before is None:
            self.on_log(logging.INFO, f"Training on {size}: {_list(now)}")
        elif before - now:
            self._warn(f"Lost {_list(before - now)} after step {self.last_step}: {size} go on from the last checkpoint")
        elif now - before:
            self.on_log(logging.INFO, f"{_list(now - before)} came after step {self.last_step}: {size} go on")
        elif self.cause is not None:
            self._warn(f"A process was lost after step {self.last_step} ({self.cause}): {size} go on from the last "
                       "checkpoint")  # fmt: skip
        self.num_failures += self.cause is not None
        cause, self.cause = self.cause, None
        if self.num_failures >= self.most_failures:
            raise TrainingCrash(
                f"the training began {self.num_failures} times from step {self.last_step} and did not come to the next "
                f"one; the last time a process ended with {cause}"
            )

    def note_step(self, step: int) -> None:
        """Take note of a step."""
        self.last_step, self.num_failures = step, 0

    def note_failure(self, cause: str) -> None:
        """Take note of why a process ended; the first one that is known counts."""
        self.cause = self.cause or cause

    def _warn(self, sentence: str) -> None:
        self.on_loss(sentence)
        self.on_log(logging.WARNING, sentence)


def _list(machines: Counter[str]) -> str:
    """Name machines, with their number where several have the same name."""
    return ", ".join(name if number == 1 else f"{name} ({number})" for name, number in sorted(machines.items()))
