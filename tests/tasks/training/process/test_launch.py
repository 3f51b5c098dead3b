"""Real processes, really killed: what a training in a process of its own tells, and that it leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from schemas.config import TrainingConfig
from tasks.training.process.ahead import choose_environment, start_waiting, take_waiting
from tasks.training.process.launch import run_training
from tasks.training.process.messages import TrainingJob, write_job
from tasks.training.records import EvalRecord, StepRecord, TrainingOutcome

NUM_STEPS = 120
CONFIG = TrainingConfig(
    rank=4, alpha=8, dropout=0.1, learning_rate=1e-3, micro_batch=2, gradient_accumulation_steps=2, num_epochs=12,
    checkpoint_every_steps=1000, eval_every_steps=60,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of threads adds in another order, which is not what is tested here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed(base_model: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> "Told":
    torch.set_num_threads(1)
    return Told(make_job(base_model, tokens, tmp_path_factory.mktemp("undisturbed")), in_place=True)


class Told:
    """A training with all that its callbacks were told."""

    def __init__(self, job: TrainingJob, **options: Any) -> None:
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvalRecord] = []
        self.lines: list[str] = []
        self.outcome: TrainingOutcome = run_training(
            job,
            on_step=self.steps.append,
            on_eval=self.evaluations.append,
            on_log=lambda level, text: self.lines.append(text),
            **options,
        )


def make_job(base_model: Path, tokens: Path, run_folder: Path) -> TrainingJob:
    return TrainingJob(base_model, tokens, run_folder, CONFIG, seed=5, identity="this run")


def find_processes(job: TrainingJob) -> list[psutil.Process]:
    """Return every process that was started for the job."""
    wanted = str(job.run_folder / "job.json")
    found = []
    for process in psutil.process_iter():
        try:
            if wanted in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def at_step(number: int, act: Callable[[], None]) -> Callable[[StepRecord], None]:
    """Return a callback that acts once: one that was interrupted is called again."""
    acted: list[int] = []

    def on_step(record: StepRecord) -> None:
        if record.step == number and not acted:
            acted.append(number)
            act()

    return on_step


def interrupt() -> None:
    raise KeyboardInterrupt


def same_adapter(one: TrainingOutcome, other: TrainingOutcome) -> bool:
    left = load_file(one.adapter / "adapter_model.safetensors")
    right = load_file(other.adapter / "adapter_model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def list_checkpoints(job: TrainingJob) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (job.run_folder / "checkpoints").glob("step-*"))


def test_a_process_of_its_own_tells_and_trains_the_same(
    base_model: Path, tokens: Path, tmp_path: Path, undisturbed: Told
) -> None:
    job = make_job(base_model, tokens, tmp_path)
    told = Told(job, in_place=False)
    assert [record.step for record in told.steps] == list(range(1, NUM_STEPS + 1))
    assert [record.loss for record in told.steps] == [record.loss for record in undisturbed.steps]
    assert told.evaluations == undisturbed.evaluations
    assert told.lines == undisturbed.lines
    assert told.lines[0].startswith("Training with the ")
    assert same_adapter(told.outcome, undisturbed.outcome)
    same: dict[str, Any] = {"adapter": Path(), "tokens_per_second": 0.0, "peak_memory_bytes": 0}
    assert replace(told.outcome, **same) == replace(undisturbed.outcome, **same)
    assert all(record.memory_bytes > 10_000_000 for record in told.steps)
    assert find_processes(job) == []


def test_interrupted_process_leaves_a_checkpoint_and_the_run_goes_on_exactly(
    base_model: Path, tokens: Path, tmp_path: Path, undisturbed: Told
) -> None:
    job = make_job(base_model, tokens, tmp_path)
    interrupted: list[float] = []
    lines: list[str] = []

    def on_step(record: StepRecord) -> None:
        if not interrupted:
            interrupted.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(job, on_step=on_step, in_place=False, on_log=lambda level, text: lines.append(text))
    assert time.monotonic() - interrupted[0] < 10
    assert find_processes(job) == []
    (step,) = list_checkpoints(job)
    assert 1 <= step < NUM_STEPS
    assert lines[-1] == f"Stopped after step {step} of {NUM_STEPS}, with a checkpoint of it"
    resumed = Told(job, in_place=True)
    assert f"Resuming from step {step} of {NUM_STEPS}" in resumed.lines
    assert resumed.outcome.resumed_from_step == step
    assert same_adapter(resumed.outcome, undisturbed.outcome)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_place_waits_for_the_checkpoint(
    base_model: Path,
    tokens: Path,
    tmp_path: Path,
    undisturbed: Told,
    number: signal.Signals,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Cancelled(BaseException):
        """As Prefect's handler raises one."""

    def cancel(*_: Any) -> None:
        raise Cancelled

    earlier = signal.signal(number, cancel)
    try:
        job = make_job(base_model, tokens, tmp_path)
        handlers: list[Any] = []

        def act() -> None:
            handlers.append(signal.getsignal(number))
            signal.raise_signal(number)

        with pytest.raises(Cancelled):
            run_training(job, on_step=at_step(7, act), in_place=True)
        assert handlers == [cancel]  # Prefect takes a run with another handler for a crash
        assert ("WARNING", "Stopping after a checkpoint; a second interruption would not wait for it") in [
            (record.levelname, record.getMessage()) for record in caplog.records
        ]
    finally:
        signal.signal(number, earlier)
    (step,) = list_checkpoints(job)
    assert 7 <= step < NUM_STEPS
    assert same_adapter(run_training(job, in_place=True), undisturbed.outcome)


def test_second_signal_in_place_does_not_wait(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    def from_step_7(record: StepRecord) -> None:
        if record.step >= 7:
            signal.raise_signal(signal.SIGINT)

    job = make_job(base_model, tokens, tmp_path)
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is begun without
    try:
        with pytest.raises(KeyboardInterrupt):
            run_training(job, on_step=from_step_7, in_place=True)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert list_checkpoints(job) == []


PARENT = """
import sys, time
from pathlib import Path
from tasks.training.process.launch import run_training
from tasks.training.process.messages import read_job

def on_step(record):
    if record.step == 1:
        print("training", flush=True)
        time.sleep(600)

run_training(read_job(Path(sys.argv[1])), on_step=on_step, in_place=False)
"""


def test_no_process_outlives_a_killed_launcher(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    # Long enough that it is not over by itself; an agent and two ranks.
    config = CONFIG.model_copy(update={"num_epochs": 1000.0, "num_processes": 2})
    job = replace(make_job(base_model, tokens, tmp_path), config=config)
    path = tmp_path / "given.json"
    write_job(job, path)
    shared = tmp_path / "shared"  # by all users, and cleared by nobody for weeks
    shared.mkdir()
    command, environment = [sys.executable, "-c", PARENT, str(path)], {**os.environ, "TMPDIR": str(shared)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "training\n"
        processes = find_processes(job)
        assert len(processes) == 3
        assert list(shared.glob("torchelastic_*")) == []
        os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert alive == []


def test_interruption_before_the_first_step_ends_at_once(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    job = make_job(base_model, tokens, tmp_path)

    def ring(*_: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2.0)  # the process lives, and is still importing
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run_training(job, in_place=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert time.monotonic() - started < 12
    assert find_processes(job) == []
    assert not (tmp_path / "checkpoints").exists()


def test_a_process_that_waited_does_the_job(
    base_model: Path, tokens: Path, tmp_path: Path, undisturbed: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start_waiting(choose_environment())
    monkeypatch.setattr("tasks.training.process.ahead._waiting", process)
    told = Told(make_job(base_model, tokens, tmp_path), in_place=False)
    assert process.poll() is not None
    assert same_adapter(told.outcome, undisturbed.outcome)
    assert [record.loss for record in told.steps] == [record.loss for record in undisturbed.steps]
    assert take_waiting() is None


def test_a_waiting_process_ends_with_the_one_that_started_it() -> None:
    program = (
        "from tasks.training.process.ahead import start_waiting, choose_environment; import os;"
        "print(start_waiting(choose_environment()).pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    waiting = [psutil.Process(int(done.stdout))] if psutil.pid_exists(int(done.stdout)) else []
    assert psutil.wait_procs(waiting, timeout=60)[1] == []


def test_a_waiting_process_that_died_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_waiting(choose_environment())
    process.kill()
    process.wait()
    monkeypatch.setattr("tasks.training.process.ahead._waiting", process)
    assert take_waiting() is None
