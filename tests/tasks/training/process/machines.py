"""Machines of a team, for tests: the run's, whose part is this process's, and others, each in a folder of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tasks.training.process.launch import run_training
from tasks.training.process.messages import TrainingJob
from tasks.training.records import EvalRecord, StepRecord, TrainingOutcome
from tests.object_store import serve_bucket


class Team:
    """The machine of the run, whose part is this process's, and others; each has a folder of its own."""

    def __init__(self, job: TrainingJob, folder: Path) -> None:
        self.job, self._folder = job, folder
        self.losses: dict[int, float] = {}
        self.evaluations: dict[int, float] = {}
        self.lines: list[str] = []
        self.guests: list[subprocess.Popen[bytes]] = []
        self.own_ranks: list[psutil.Process] = []
        """Of the run's machine, known before they train: a training is over sooner than they are looked for."""
        self.guest_processes: list[psutil.Process] = []
        """Of the others, with their agents and ranks."""
        self._is_over = threading.Event()
        self._answers: dict[str, Callable[[], None]] = {}
        self._acts: list[tuple[Callable[[StepRecord], bool], Callable[[], None]]] = []

    def add_guest(self, *, wait_seconds: float = 300) -> None:
        """Start a machine that joins."""
        folder = self._folder / f"guest-{len(self.guests)}"
        command = [sys.executable, "-m", "flows.cli", "join", "--wait", str(wait_seconds)]
        environment = {**os.environ, "SFT_HOME": str(folder)}
        with folder.with_suffix(".log").open("w") as log:
            guest = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.guests.append(guest)

    def add_torchrun(self) -> None:
        """Start a machine that joins by torchrun's own command, as `sft join --torchrun` prints it."""
        number = len(self.guests)
        environment = {**os.environ, "SFT_HOME": str(self._folder / f"guest-{number}")}
        asked = [sys.executable, "-m", "flows.cli", "join", "--torchrun"]
        command = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout
        with (self._folder / f"guest-{number}.log").open("w") as log:
            guest = subprocess.Popen(command, shell=True, stdout=log, stderr=log, start_new_session=True)
        self.guests.append(guest)

    def read_log(self, number: int) -> str:
        return (self._folder / f"guest-{number}.log").read_text()

    def when(self, condition: Callable[[StepRecord], bool], act: Callable[[], None]) -> None:
        """Do something once, at the first step, after what was said before, that is as wanted."""
        self._acts.append((condition, act))

    def when_told(self, word: str, act: Callable[[], None]) -> None:
        """Do something once when a line of the log has a word."""
        self._answers[word] = act

    def train(self) -> TrainingOutcome:
        """Train on the run's machine; the others end by themselves then."""
        threading.Thread(target=self._watch_ranks, daemon=True).start()
        try:
            return run_training(
                self.job,
                on_step=self._note,
                on_eval=self._note_evaluation,
                on_log=lambda level, text: self._note_line(text),
                silence_seconds=600,  # of processes that a test has stopped
            )
        finally:
            self._is_over.set()
            for guest in self.guests:
                try:
                    guest.wait(timeout=60)
                finally:
                    kill_tree(guest.pid)

    def find_guest_processes(self) -> list[psutil.Process]:
        """Return ranks, agents and commands of other machines than the run's."""
        living = [psutil.Process(guest.pid) for guest in self.guests if guest.poll() is None]
        return [each for guest in living for each in (guest, *guest.children(recursive=True))]

    def lose_guests(self) -> None:
        """Kill them with all that they have started, at once, as a machine takes it along that loses its power."""
        for process in self.guest_processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _watch_ranks(self) -> None:
        while not self._is_over.wait(0.3):
            below = psutil.Process().children(recursive=True)
            self.own_ranks = [process for process in below if is_rank_of(self.job, process)]
            self.guest_processes = self.find_guest_processes()

    def _note(self, record: StepRecord) -> None:
        self.losses[record.step] = record.loss  # a step that is done again has the same loss, or the test fails
        if self._acts and self._acts[0][0](record):
            self._acts.pop(0)[1]()

    def _note_line(self, text: str) -> None:
        self.lines.append(text)
        for word in [word for word in self._answers if word in text]:
            self._answers.pop(word)()

    def _note_evaluation(self, record: EvalRecord) -> None:
        self.evaluations[record.step] = record.loss


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started, as a machine takes them along that loses its power."""
    try:
        every = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in every:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


@contextmanager
def shared(kind: str, folder: Path) -> Iterator[str]:
    """Give what machines share: a folder, or one of a bucket."""
    if kind == "folder":
        yield str(folder / "shared")
        return
    with serve_bucket("team"):
        yield f"s3://team/{folder.name}"  # of its own: the server keeps what tests before have left


def hold_until_told_to_stop(processes: list[psutil.Process]) -> None:
    """Stop ranks where they are until their agent has sent them SIGTERM: somebody else has come."""
    assert processes, "no rank is known"
    for process in processes:
        process.suspend()

    def wait() -> None:
        for process in processes:
            while not has_pending(process.pid, signal.SIGTERM):
                time.sleep(0.05)
            process.resume()

    threading.Thread(target=wait, daemon=True).start()


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Say whether a signal waits for a process, or the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))
    return bool(mask >> (number - 1) & 1)


def is_rank_of(job: TrainingJob, process: psutil.Process) -> bool:
    """Say whether a process is a rank of the run's machine, and no agent."""
    try:
        return str(job.run_folder / "job.json") in process.cmdline() and "RANK" in process.environ()
    except psutil.Error:
        return False
