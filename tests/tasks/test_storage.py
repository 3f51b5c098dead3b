"""The cache gives back what was put in, under its digest, and locks belong to the living."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import storage


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))


def _folder(root: Path, text: str) -> Path:
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text(text)
    (root / "sub" / "b.txt").write_text("b")
    return root


def test_digest_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    first = storage.digest_folder(_folder(tmp_path / "one", "x"))
    assert first == storage.digest_folder(_folder(tmp_path / "two", "x"))
    assert first != storage.digest_folder(_folder(tmp_path / "three", "y"))
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "c.txt")
    assert first != storage.digest_folder(tmp_path / "two")


def test_kept_folder_is_found_and_an_equal_one_changes_nothing() -> None:
    for _ in range(2):
        with storage.new_folder() as folder:
            _folder(folder / "data", "x")
            digest = storage.digest_folder(folder / "data")
            kept = storage.keep_folder(folder / "data", digest)
        assert (kept / "a.txt").read_text() == "x"
        assert storage.cached_folder(digest) == kept


def test_a_new_home_is_its_owners_alone_and_an_old_one_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "new" / "home"))
    assert storage.make_home().stat().st_mode & 0o777 == 0o700
    storage.home().chmod(0o755)
    assert storage.make_home().stat().st_mode & 0o777 == 0o755


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than SFT_HOME: in memory, mounted where that is allowed."""
    mounted = tmp_path / "elsewhere"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mounted], capture_output=True).returncode == 0:
        yield mounted
        subprocess.run(["umount", "-l", mounted], check=True)
    elif Path("/dev/shm").is_dir() and Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    else:
        pytest.skip("there is one file system only")


def test_a_folder_of_another_file_system_is_moved_whole(elsewhere: Path) -> None:
    folder = _folder(elsewhere / "data", "x")
    digest = storage.digest_folder(folder)
    kept = storage.keep_folder(folder, digest)
    assert storage.digest_folder(kept) == digest
    assert storage.cached_folder(digest) == kept
    assert not folder.exists()
    assert list((storage.home() / "cache" / "new").iterdir()) == []


def test_a_move_that_breaks_off_leaves_nothing_in_the_cache(elsewhere: Path) -> None:
    folder = _folder(elsewhere / "data", "x")
    (folder / "sub" / "c.txt").symlink_to("b.txt")
    os.mkfifo(folder / "z")  # cannot be copied, and comes after files that can
    with pytest.raises(shutil.Error):
        storage.keep_folder(folder, "0" * 64)
    assert storage.cached_folder("0" * 64) is None
    assert (folder / "a.txt").read_text() == "x"
    assert list((storage.home() / "cache" / "new").iterdir()) == []


def test_what_a_killed_process_has_left_is_deleted_and_what_a_living_one_holds_is_not() -> None:
    code = (
        "import os, signal\nfrom tasks import storage\nwith storage.new_folder() as folder:\n"
        " (folder / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    root = storage.home() / "cache" / "new"
    assert len(list(root.rglob("half"))) == 1
    with storage.new_folder() as folder:
        assert [path for path in root.iterdir() if path.is_dir()] == [folder]
        assert storage.clear_abandoned(root) == []
        (folder / "whole").write_text("whole")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("place", ["file/home", "/proc/1/home"])
def test_a_home_that_cannot_be_written_to_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SFT_HOME", str(tmp_path / place))
    with pytest.raises(storage.HomeError, match=r"SFT_HOME = .*nothing can be written there \(.*set SFT_HOME"):
        storage.check_home()


def test_a_lock_ends_with_its_process() -> None:
    code = (
        "import os, signal\nfrom tasks import storage\nwith storage.hold_run('r'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not storage.is_held("r")
    with storage.hold_run("r"):
        assert storage.is_held("r")
        with pytest.raises(ValueError, match="another process"), storage.hold_run("r"):
            pass
