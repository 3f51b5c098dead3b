"""Processes of a home: which there are, what they took, and which outlive their run."""

import time
from contextlib import suppress
from pathlib import Path

import psutil

_ENDING_SECONDS = 60.0
"""What processes have to end after the run's own has."""


def find_processes(home: Path) -> list[psutil.Process]:
    """Return the processes that a run of this home has started and that live on after it."""
    end = time.monotonic() + _ENDING_SECONDS
    while (found := list_processes(home)) and time.monotonic() < end:  # they may be about to end
        time.sleep(0.2)
    return found


def describe_processes(processes: list[psutil.Process]) -> list[str]:
    """Return what is known of processes; one that ends meanwhile is none that is left behind."""
    lines = []
    for process in processes:
        with suppress(psutil.Error):
            lines.append(f"process {process.pid} {process.cmdline()}")
    return lines


def list_processes(home: Path) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("SFT_HOME") == str(home):
                found.append(process)
    return found


def cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return sum(process.cpu_times()[:2])
    return 0.0


def list_family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
