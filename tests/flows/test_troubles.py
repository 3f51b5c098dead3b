"""What goes wrong around a run is one sentence with the way out; what may be a defect keeps its trace."""

import errno
import socket
from pathlib import Path

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.troubles import explain_trouble


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "make room"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT INTO runs]"), "make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "make it writable"),
        (RuntimeError("(sqlite3.OperationalError) database is locked\n[SQL: UPDATE runs]"), "another program"),
    ],
)
def test_disks_and_locks(error: Exception, word: str) -> None:
    said = str(explain_trouble(error))
    assert word in said
    assert "start the same command again" in said
    assert "\n" not in said


def test_a_file_deleted_under_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as inside:
        (tmp_path / "cache" / "x").read_bytes()
    assert "deleted under the run" in str(explain_trouble(inside.value))
    with pytest.raises(FileNotFoundError) as outside:
        (tmp_path.parent / "elsewhere").read_bytes()
    assert explain_trouble(outside.value) is None


def test_a_server_that_does_not_answer() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/api"  # bound, and nobody listens
        with temporary_settings({PREFECT_API_URL: address}), get_client(sync_client=True) as client:
            with pytest.raises(RuntimeError, match="Failed to reach API") as unreachable:
                client.raise_for_api_version_mismatch()
            assert f"Prefect's server at {address} does not answer" in str(explain_trouble(unreachable.value))
    elsewhere = httpx.ConnectError("no", request=httpx.Request("GET", "https://hub.example/x"))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        assert str(explain_trouble(elsewhere)).startswith("hub.example does not answer")


def test_defects_keep_their_trace() -> None:
    assert explain_trouble(KeyError("x")) is None
    defect = KeyError("x")
    defect.__context__ = httpx.ConnectError("no")
    assert explain_trouble(defect) is None
