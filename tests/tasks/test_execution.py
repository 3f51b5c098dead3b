"""Work of shards runs in processes of its own, which do not outlive the one that asked."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks import execution


def test_function_runs_in_another_process_and_its_error_comes_back() -> None:
    assert execution.call(math.factorial, 5) == 120
    assert execution.call(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match=r"negative"):
        execution.call(math.factorial, -1)


# As a file and without a guard: a worker that imported it would start workers in its turn.
PROGRAM = """
import wave
from tasks import execution
print(execution.call(eval, "'wave' in __import__('sys').modules"))
"""


def test_worker_does_not_import_the_program_that_asked(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.check_output([sys.executable, tmp_path / "program.py"], env=environment)
    assert output.split() == [b"False"]


SCRIPT = """
import os, time
from tasks import execution
futures = [execution.submit(time.sleep, 60) for _ in range(3)]
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_workers_end_when_their_process_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    end = time.monotonic() + 30
    while len(children := psutil.Process(process.pid).children(recursive=True)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) >= 2
    assert alive == []
