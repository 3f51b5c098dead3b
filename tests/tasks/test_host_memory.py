"""What is free of the host's memory."""

from pathlib import Path

import psutil
import pytest

from tasks.host_memory import read_free_host


def test_the_hosts_free_memory_is_its_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert read_free_host(tmp_path / "none") == 1000
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    for limit, expected in (("max", 1000), ("900", 300), ("5000", 1000), ("500", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert read_free_host(tmp_path) == expected
