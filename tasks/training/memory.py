"""What a training takes of the machine: its memory, and how busy its GPU is."""

import time
from functools import lru_cache

import psutil
import torch


class OutOfMemory(Exception):  # noqa: N818
    """A step did not fit, on this rank or another one; the adapter and the optimizer are unchanged."""


def read_memory(device: torch.device) -> int:
    """Return the bytes in use: the GPU allocation at its highest since `reset_memory`, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def reset_memory(device: torch.device) -> None:
    """Begin a new highest allocation."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_utilisation(device: torch.device) -> float | None:
    """Return the part of the last moments in which the GPU was at work, 0 to 1; None where nobody can say."""
    return _ask_driver(device, int(time.monotonic())) if device.type == "cuda" else None


@lru_cache(maxsize=1)
def _ask_driver(device: torch.device, second: int) -> float | None:
    """Ask at most once a second: a question takes the driver longer than a small step."""
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # no nvidia-ml-py, or a driver that does not answer: a gauge must not end a training
        return None
