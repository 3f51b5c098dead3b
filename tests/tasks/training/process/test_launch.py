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
from tasks.training.checkpoints import CheckpointError
from tasks.training.process.ahead import choose_environment, start_waiting, take_waiting
from tasks.training.process.launch import run_training
from tasks.training.process.messages import TrainingJob, write_job
from tasks.training.process.supervise import Listeners, Supervisor
from tasks.training.records import (
    EvalRecord,
    StepRecord,
    TrainingCrash,
    TrainingError,
    TrainingOutcome,
    TrainingStopped,
)

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

    def on_step(record: StepRecord) -> None:
        if not interrupted:
            interrupted.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(job, on_step=on_step, in_place=False)
    assert time.monotonic() - interrupted[0] < 10
    assert find_processes(job) == []
    (step,) = list_checkpoints(job)
    assert 1 <= step < NUM_STEPS
    resumed = run_training(job, in_place=True)
    assert resumed.resumed_from_step == step
    assert same_adapter(resumed, undisturbed.outcome)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_place_waits_for_the_checkpoint(
    base_model: Path, tokens: Path, tmp_path: Path, undisturbed: Told, number: signal.Signals
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
from tasks.training.process.ahead import choose_environment, start_waiting, take_waiting
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


# As a training process, without a training: the imports of one take ten seconds.
TELL = """
from tasks.training.process.connection import connect_worker
connection = connect_worker(role="rank")
for number in range(50):
    connection.send("log", level=20, message=str(number))
{then}
connection.close()
"""
SAY = Callable[[int, str], None]


def supervise(program: str, log: Path, *, on_log: SAY = lambda level, text: None) -> TrainingOutcome:
    listeners = Listeners(lambda record: None, lambda record: None, on_log)
    with Supervisor(listeners, log, silence_seconds=2) as supervisor:
        supervisor.start(["-c", program])
        try:
            return supervisor.wait()
        except BaseException:
            supervisor.stop(10)
            raise


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


def test_interruption_loses_no_word(tmp_path: Path) -> None:
    told: list[str] = []

    def on_log(level: int, text: str) -> None:
        told.append(text)
        if len(told) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(TELL.format(then=""), tmp_path / "log", on_log=on_log)
    assert told == [str(number) for number in range(50)]


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL, perhaps by the kernel"),
        ("import os, time; print('a last word', flush=True); os._exit(7)", r"ended with exit code 7(.|\n)*a last word"),
        ("print(1 / 0)", r"ended with exit code 1(.|\n)*ZeroDivisionError"),
    ],
)
def test_end_without_an_outcome_is_told_with_the_log(tmp_path: Path, then: str, message: str) -> None:
    log = tmp_path / "log"
    with pytest.raises(TrainingCrash, match=message) as caught:
        supervise(TELL.format(then=then), log)
    assert str(log) in str(caught.value)


def say_error(kind: str, message: str) -> str:
    return f"connection.send('error', type='{kind}', message='{message}', traceback='Traceback of it')"


@pytest.mark.parametrize(
    ("then", "kind", "message"),
    [
        (say_error("TrainingError", "no examples"), TrainingError, "^no examples$"),
        (say_error("CheckpointError", "of another run"), CheckpointError, "^of another run$"),
        (say_error("OutOfMemoryError", "CUDA out of memory"), TrainingError, "^CUDA out of memory$"),
        (say_error("KeyError", "x"), TrainingCrash, "failed with KeyError: x\nTraceback of it"),
        (say_error("KeyError", "x") + "; " + say_error("RuntimeError", "y"), TrainingCrash, "failed with KeyError: x"),
        # The rank that lost its peer is heard first; the peer knows why.
        (say_error("RuntimeError", "peer") + "; " + say_error("TrainingError", "NaN"), TrainingError, "^NaN$"),
    ],
)
def test_errors_come_back_as_they_were_raised(tmp_path: Path, then: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        supervise(TELL.format(then=then), tmp_path / "log")
    assert type(caught.value) is kind


def test_processes_that_somebody_else_stopped_are_told_from_crashed_ones(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="stopped from outside, after a checkpoint"):
        supervise(TELL.format(then="connection.send('stopped')"), tmp_path / "train.log")


def test_where_no_rank_has_spoken_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    listeners = Listeners(lambda record: None, lambda record: None, lambda level, text: None)
    with Supervisor(listeners, tmp_path / "train.log", silence_seconds=60) as supervisor:
        supervisor.start(["-c", "import time; time.sleep(60)"])
        began = time.monotonic()
        supervisor.stop(10)
        assert time.monotonic() - began < 5


def test_a_message_that_comes_in_parts_is_heard_whole(tmp_path: Path) -> None:
    program = """
import os, socket, time
from tasks.training.process.messages import ADDRESS_VARIABLE
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ[ADDRESS_VARIABLE])
connection.sendall(b'{"kind": "log", "level": 20, "message": "from be')
time.sleep(0.5)
connection.sendall(b'ginning to end"}' + bytes([10]))
"""
    heard: list[str] = []
    with pytest.raises(TrainingCrash):
        supervise(program, tmp_path / "train.log", on_log=lambda level, text: heard.append(text))
    assert heard == ["from beginning to end"]


def test_silent_process_is_killed(tmp_path: Path) -> None:
    pids: list[int] = []

    def on_log(level: int, text: str) -> None:
        if text == "49":
            # What other tests have started may be children of this process too, living or dead.
            living = [process for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE]
            (child,) = (process for process in living if "time.sleep(600)" in " ".join(process.cmdline()))
            pids.append(child.pid)
            child.send_signal(signal.SIGSTOP)

    started = time.monotonic()
    with pytest.raises(TrainingCrash, match=r"\(rank\) gave no sign of life for [2-4] s and was killed"):
        supervise(TELL.format(then="import time; time.sleep(600)"), tmp_path / "log", on_log=on_log)
    assert time.monotonic() - started < 30
    assert not psutil.pid_exists(pids[0])


def test_beats_keep_a_busy_process_alive_at_any_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.process.supervise._START_SECONDS", 3.0)
    with pytest.raises(TrainingCrash, match="ended with exit code 3"):
        supervise(TELL.format(then="import os, time; time.sleep(6); os._exit(3)"), tmp_path / "log")


# An outcome, and the end of the line: what comes after it is the process's own ending.
OUTCOME = (
    "connection.send('outcome', adapter='adapter', num_steps=3, final_loss=0.5, best_eval_loss=None, adapter_step=3, "
    "sweep=None, resumed_from_step=None, num_examples=4, num_packs=4, packing_efficiency=1.0, num_trained_tokens=5, "
    "num_trainable_parameters=6, tokens_per_second=7.0, peak_memory_bytes=8, adapted=[], warnings=[])"
)


@pytest.mark.parametrize(
    "ending",
    [
        "connection.close(); import time; time.sleep(3)",  # a GPU's memory is being given back
        "connection.close(); import time; time.sleep(60)",  # and is never given back
        "import os, time; connection.close = lambda: None; os.kill(os.getpid(), 19)",  # stopped, with its line open
        "connection.close(); import os; os.kill(os.getpid(), 11)",
        "connection.send('error', type='RuntimeError', message='in its ending', traceback='')",
    ],
)
def test_a_training_that_told_its_outcome_has_ended_well_however_its_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr("tasks.training.process.supervise._START_SECONDS", 2.0)
    monkeypatch.setattr("tasks.training.process.supervise._EXIT_SECONDS", 5.0)
    outcome = supervise(TELL.format(then=f"{OUTCOME}; import time; time.sleep(2.2)\n{ending}"), tmp_path / "log")
    assert (outcome.num_steps, outcome.final_loss) == (3, 0.5)


def test_what_goes_wrong_seconds_after_the_outcome_is_still_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late = f"{OUTCOME}; import time; time.sleep(2.5); {say_error('RuntimeError', 'in its ending')}"
    assert supervise(TELL.format(then=late), tmp_path / "log").num_steps == 3
    assert "After the training had ended: " in caplog.text
    assert "in its ending" in caplog.text


def test_what_a_process_said_before_it_ended_is_heard(tmp_path: Path) -> None:
    said: list[str] = []

    def listen(level: int, text: str) -> None:
        said.append(text)
        if text == "0":
            time.sleep(3)  # meanwhile the process says its outcome and ends

    program = TELL.format(then=f"import os, time; time.sleep(0.5)\n{OUTCOME}\nconnection.close()\nos._exit(0)")
    assert supervise(program, tmp_path / "log", on_log=listen).num_steps == 3
    assert said == [str(number) for number in range(50)]


def test_what_a_process_has_started_ends_with_it(tmp_path: Path) -> None:
    children: list[int] = []
    program = TELL.format(
        then="import os, subprocess; child = subprocess.Popen(['sleep', '60'])\n"
        "connection.send('log', level=20, message=f'child {child.pid}')\nconnection.close()\nos._exit(3)"
    )
    with pytest.raises(TrainingCrash, match="ended with exit code 3"):
        supervise(
            program,
            tmp_path / "log",
            on_log=lambda level, text: children.append(int(text.split()[1])) if text.startswith("child") else None,
        )
    (child,) = children
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it outlives the training"
        time.sleep(0.1)


def test_rank_that_connects_while_the_others_stop_is_stopped_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    program = """
import time
from tasks.training.process.connection import connect_worker
first = connect_worker(role="rank")
first.should_stop()
first.send("log", level=20, message="ready")
while not first.should_stop():
    time.sleep(0.05)
late = connect_worker(role="rank")
while not late.should_stop():
    time.sleep(0.05)
late.send("stopped")
late.close()
first.close()
"""

    def stop(level: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(program, tmp_path / "log", on_log=stop)
    assert "did not stop" not in caplog.text


def test_a_process_that_never_speaks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.process.supervise._START_SECONDS", 1.0)
    with pytest.raises(TrainingCrash, match="did not start within 1 s"):
        supervise("import time; time.sleep(60)", tmp_path / "log")


def test_the_allocator_is_set_where_nobody_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os; open({path!r}, 'w').write(os.environ.get('PYTORCH_CUDA_ALLOC_CONF', 'none'))"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for chosen, expected in ((None, "expandable_segments:True"), ("max_split_size_mb:64", "max_split_size_mb:64")):
        if chosen:
            monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", chosen)
        with pytest.raises(TrainingCrash, match="exit code 0 without an outcome"):
            supervise(program.format(path=str(tmp_path / "seen")), tmp_path / "log")
        assert (tmp_path / "seen").read_text() == expected
