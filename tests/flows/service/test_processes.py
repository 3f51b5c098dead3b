"""Processes are found and ended by id and start time; what a killed one leaves behind is ended too."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.service import processes
from flows.service.settings import ServiceError

_SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]
# Starts a child in a session of its own, as a training does, and says which.
_PARENT = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
pathlib.Path("child").write_text(str(child.pid))
time.sleep(300)
"""
# Starts a child whose environment says nothing, as that of one which is just becoming another program.
_PARENT_OF_A_STRANGER = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True, env={})
pathlib.Path("child").write_text(str(child.pid))
time.sleep(300)
"""
# A worker that kills its run as soon as it is asked to end, as Prefect's does; the run keeps what it has when asked.
_WORKER = """
import os, pathlib, signal, subprocess, sys, time
run = '''
import pathlib, signal, sys, time
def keep(*_):
    time.sleep(0.5)
    pathlib.Path("kept").write_text("yes")
    sys.exit()
signal.signal(signal.SIGTERM, keep)
pathlib.Path("ready").write_text("yes")
time.sleep(300)
'''
child = subprocess.Popen([sys.executable, "-c", run], env={**os.environ, "PREFECT__FLOW_RUN_ID": "1"})
signal.signal(signal.SIGTERM, lambda *_: (child.kill(), sys.exit()))
child.wait()
time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    processes.stop_all(tmp_path, ())


def _start(folder: Path, name: str, command: list[str] = _SLEEP) -> psutil.Process:
    processes.start(folder, name, command, dict(os.environ), folder)
    found = processes.find(folder, name)
    assert found is not None
    return found


def _wait_for_file(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()


def test_started_twice_it_runs_once(folder: Path) -> None:
    first = _start(folder, "server")
    assert _start(folder, "server").pid == first.pid
    assert [process.pid for process in processes.marked(folder)] == [first.pid]


def test_it_leads_a_session_of_its_own(folder: Path) -> None:
    process = _start(folder, "server")
    assert os.getsid(process.pid) == process.pid != os.getsid(0)


def test_stopped_leaves_nothing_running(folder: Path) -> None:
    started = [_start(folder, name) for name in ("server", "worker")]
    assert processes.stop_all(folder, ("worker", "server")) == 2
    assert not any(process.is_running() for process in started)
    assert processes.names(folder) == []
    assert processes.stop_all(folder, ("worker", "server")) == 0


def test_one_whose_environment_does_not_show_the_mark_yet_is_counted_and_stopped(folder: Path) -> None:
    with subprocess.Popen(_SLEEP, start_new_session=True) as unmarked:  # as between fork and exec
        process = psutil.Process(unmarked.pid)
        record = {"pid": process.pid, "started": processes._started(process.pid)}
        (folder / "server.process").write_text(json.dumps(record))
        assert [found.pid for found in processes.marked(folder)] == [process.pid]
        assert processes.stop_all(folder, ("server",)) == 1
        assert not process.is_running()


def test_a_child_whose_environment_does_not_show_the_mark_is_counted_and_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_END_SECONDS", 0.5)
    _start(folder, "worker", [sys.executable, "-c", _PARENT_OF_A_STRANGER])
    child = psutil.Process(int(_wait_for_file(folder / "child")))
    assert child.environ().get("SFT_SERVICE") is None
    assert processes.stop_all(folder, ("worker",)) == 2
    assert not child.is_running()


def test_a_run_is_asked_before_its_worker(folder: Path) -> None:
    _start(folder, "worker", [sys.executable, "-c", _WORKER])
    _wait_for_file(folder / "ready")
    processes.stop(folder, "worker")
    assert (folder / "kept").is_file()


def test_what_a_killed_worker_left_behind_is_stopped_too(folder: Path) -> None:
    worker = _start(folder, "worker", [sys.executable, "-c", _PARENT])
    orphan = psutil.Process(int(_wait_for_file(folder / "child")))
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    assert orphan.is_running()
    processes.stop_all(folder, ("worker",))
    assert not orphan.is_running()


def test_a_recycled_process_id_is_never_touched(folder: Path) -> None:
    stranger = psutil.Process()  # this test: a living process whose id a stale record names
    record = {"pid": stranger.pid, "started": f"1{processes._started(stranger.pid)}"}  # later
    (folder / "server.process").write_text(json.dumps(record))
    assert processes.find(folder, "server") is None
    assert processes.stop_all(folder, ("server",)) == 0
    assert stranger.is_running()


def test_a_changed_clock_hides_no_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = _start(folder, "server")
    boot = psutil.boot_time()  # psutil adds it to what the kernel says, and it moves with the clock
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + 3600.0)
    monkeypatch.setattr("psutil._pslinux.BOOT_TIME", boot + 3600.0, raising=False)
    found = processes.find(folder, "server")
    assert found is not None
    assert found.pid == started.pid
    assert processes.stop_all(folder, ("server",)) == 1


def test_another_folders_processes_are_left_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    process = _start(other, "server")
    processes.stop_all(folder, ("server",))
    assert process.is_running()
    assert processes.stop_all(other, ("server",)) == 1


def test_one_that_ignores_the_request_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_END_SECONDS", 0.5)
    code = "import signal, pathlib, time; signal.signal(15, signal.SIG_IGN); pathlib.Path('ready').write_text('x')"
    process = _start(folder, "stubborn", [sys.executable, "-c", f"{code}; time.sleep(300)"])
    _wait_for_file(folder / "ready")
    processes.stop_all(folder, ())
    assert not process.is_running()


def test_one_that_dies_while_starting_is_reported_with_the_end_of_its_log(folder: Path) -> None:
    processes.start(
        folder, "server", [sys.executable, "-c", "raise SystemExit('no such port')"], dict(os.environ), folder
    )
    with pytest.raises(ServiceError, match=r"server ended.*\n.*no such port"):
        processes.wait_until(lambda: False, folder, "server", seconds=20)


def test_two_commands_at_once_take_turns(folder: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with processes.only_one(folder):
            order.append("second")

    with processes.only_one(folder):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
