"""What the supervisor of training processes hears and does, with small programs in place of trainings."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tasks.training.checkpoints import CheckpointError
from tasks.training.process.supervise import Listeners, Supervisor
from tasks.training.records import TrainingCrash, TrainingError, TrainingOutcome, TrainingStopped

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
