"""How much of the host's memory is free, and how much of it a training may take for what its GPU has no room for."""

from pathlib import Path

import psutil

HOST_SHARE = 0.75
"""Of the free memory that may be taken: what is page-locked is never swapped out."""
_CGROUP = Path("/sys/fs/cgroup")


def read_free_host(cgroup: Path = _CGROUP) -> int:
    """Return the bytes of the host's memory that are free: the machine's, or those that its container leaves.

    Args:
        cgroup: where the kernel tells a container's limits (cgroup v2); without these the machine's count alone.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if limit == "max":
        return free
    # Files that are only cached are let go of when memory is wanted.
    return max(0, min(free, int(limit) - used + int(statistics.get("inactive_file", 0))))
