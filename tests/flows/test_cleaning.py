"""What was not used lately is deleted, what is wanted stays, and a month of runs takes no more room than a week."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cleaning import DAY_SECONDS, LOG, delete, find_waste, measure
from flows.cli import app
from tasks import storage, tracking


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("database")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}/mlflow.db")
    return tmp_path / "home"


def make_run(status: str) -> str:
    experiment = tracking.open_experiment("clean")
    run_id = str(tracking.client().create_run(experiment).info.run_id)
    tracking.client().update_run(run_id, status=status)
    checkpoint = storage.run_folder(run_id) / "train" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trained.safetensors").write_bytes(b"x" * 1000)
    return run_id


def keep(content: str) -> Path:
    with storage.new_folder() as folder:
        (folder / "data").mkdir()
        (folder / "data" / "rows.txt").write_text(content * 100)
        return storage.keep_folder(folder / "data", storage.digest_folder(folder / "data"))


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY_SECONDS
    for each in [path, *path.rglob("*")]:
        os.utime(each, (then, then))


def test_what_is_old_goes_and_what_is_used_held_or_may_go_on_stays(home: Path) -> None:
    old, used, new = keep("old"), keep("used"), keep("new")
    finished, killed, held, recent = (make_run(status) for status in ("FINISHED", "KILLED", "FAILED", "FINISHED"))
    (home / "results").mkdir()
    (home / "results" / "old").write_text("{}")
    for path in (old, used, home / "results", *(home / "runs" / run for run in (finished, killed, held))):
        age(path, 40)
    assert storage.cached_folder(used.name) == used  # its use makes it young
    with storage.hold_run(held):
        age(home / "runs" / held, 40)
        waste = find_waste(days=30, interrupted=False)
        assert {item.path for item in waste} == {old, home / "results" / "old", home / "runs" / finished}
        assert {item.path for item in find_waste(days=30, interrupted=True)} - {item.path for item in waste} == {
            home / "runs" / killed
        }
    delete(waste)
    delete(waste)  # somebody else was faster
    assert not old.exists()
    assert new.exists()
    assert sorted(path.name for path in (home / "runs").iterdir()) == sorted([killed, held, recent])


def test_what_is_used_again_before_it_is_deleted_stays(home: Path) -> None:
    used, unused = keep("used"), keep("unused")
    taken, free = (make_run("FINISHED") for _ in range(2))
    (home / "results").mkdir()
    (home / "results" / "key").write_text("{}")
    for path in (used, unused, home / "results", *(home / "runs" / run for run in (taken, free))):
        age(path, 40)
    waste = find_waste(days=30, interrupted=False)
    assert len(waste) == 5
    assert storage.cached_folder(used.name) == used
    (home / "results" / "key").write_text("{}")
    with storage.hold_run(taken):
        delete(waste)
    assert sorted(path for path in (used, unused) if path.exists()) == [used]
    assert [path.name for path in (home / "results").iterdir()] == ["key"]
    assert [path.name for path in (home / "runs").iterdir()] == [taken]


def test_what_vanishes_while_it_is_looked_at_is_no_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep("there")
    real = os.walk

    def walk(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        yield from ((folder, [*folders, "gone"], [*files, "gone.txt"]) for folder, folders, files in real(top))

    monkeypatch.setattr("os.walk", walk)
    assert measure(kept) == len("there") * 100


def test_a_home_where_nothing_can_be_deleted_is_one_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("flows.record_cleaning.compact", refuse)
    make_run("FINISHED")
    said = CliRunner().invoke(app, ["clean"])
    assert said.exit_code == 1
    assert said.exception is None or isinstance(said.exception, SystemExit)
    assert "make it writable" in " ".join(said.output.split())


def test_the_command_says_what_it_would_do_and_does_it(home: Path) -> None:
    old = keep("old")
    age(old, 40)
    said = CliRunner().invoke(app, ["clean", "--dry-run"])
    assert said.exit_code == 0, said.output
    assert "cached folder: 1 would be deleted" in said.output
    assert old.exists()
    assert "cached folder: 1 deleted" in CliRunner().invoke(app, ["clean"]).output
    assert not old.exists()
    assert "Nothing that was not used for 30 days" in CliRunner().invoke(app, ["clean"]).output
    assert CliRunner().invoke(app, ["clean", "--days", "0"]).exit_code != 0


def test_a_long_log_is_shortened_under_its_writer(home: Path) -> None:
    logs = home / "service" / "logs"
    logs.mkdir(parents=True)
    (logs / "short.log").write_bytes(b"one line\n")
    with (logs / "cpu-worker.log").open("ab", buffering=0) as writer:
        for turn in range(3):
            for number in range(90):
                writer.write(f"{turn} {number:02} ".encode() + b"x" * 100_000 + b"\n")
            (item,) = [each for each in find_waste(days=30, interrupted=False) if each.what == LOG]
            before = measure(logs)
            delete([item])
            assert before - measure(logs) == pytest.approx(item.num_bytes, abs=110_000)
            writer.write(f"{turn} after\n".encode())
            former = (logs / "cpu-worker.log.1").read_bytes().splitlines()
            assert [line[:4] for line in former[-2:]] == [f"{turn} {number}".encode() for number in (88, 89)]
            assert all(len(line) > 100_000 for line in former), "cut within a line"
            assert len(former) in (83, 84)
            assert (logs / "cpu-worker.log").read_bytes() == f"{turn} after\n".encode()
    assert (logs / "short.log").read_bytes() == b"one line\n"
    assert {path.stat().st_mode & 0o077 for path in logs.glob("*.1")} == {0}
    assert find_waste(days=30, interrupted=False) == []


def test_ten_runs_a_day_for_a_month_take_no_more_room_than_a_week_of_them(home: Path) -> None:
    sizes = []
    for day in range(30):
        for path in [*(home / "cache").glob("[0-9a-f][0-9a-f]/*"), *(home / "runs").glob("*")]:
            age(path, (time.time() - path.stat().st_mtime) / DAY_SECONDS + 1)
        for number in range(10):
            keep(f"day {day} run {number:02}")
            (storage.run_folder(f"day-{day}-{number}") / "trained.safetensors").write_bytes(b"x" * 1000)
        make_run("FINISHED")
        delete(find_waste(days=6.5, interrupted=False))
        sizes.append(measure(home))
    week = max(sizes[:8])
    assert sizes[-1] <= 1.05 * week
    assert week > 5 * sizes[0]
