"""Runs the pipeline, lets something go wrong at some moment, starts it again, and checks what has to hold then.

    python -m tests.laboratory.crashes --draws 100 --seed 7

A seed draws the fault and the moment. The laws, for each draw:

- the run ends as the undisturbed one: same adapter, same accounting, one version; or it refuses in words, and the next
  start ends so;
- an attempt that was cut short goes on in the same MLflow run;
- nothing hangs, and nothing is left behind: no process, no half-written file, no run that seems to be running.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from tests.laboratory.damage import cut, delete, flip

ROOT = Path(__file__).resolve().parents[2]
NAME, LOST = "crash-laboratory", "none"
_ROWS = 60
_IDLE_SECONDS = 240.0
"""A run that computes nothing for so long hangs. On a busy machine one that works may take many times longer."""
_PATIENCE_SECONDS = 1200.0
_LEAST_CPU_SECONDS = 1.0
_ENDING_SECONDS = 60.0
"""What processes have to end after the run's own has."""
_DISK_BYTES = 400 << 20
_SERVER_START_SECONDS = 300.0
_LOCK_SECONDS = 30.0
CLOCK = next((str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
"""Debian's libfaketime, which lets a process see another clock; None where it is not installed."""
_CLOCK_FILE = "clock"  # of a home: how far its runs' clock is off
# As when a machine's clock is set: the monotonic one goes on, and so do the times that files have already.
_CLOCK = {
    "LD_PRELOAD": str(CLOCK),
    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    "NO_FAKE_STAT": "1",
    "FAKETIME_CACHE_DURATION": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).with_name('clock')}",
}


@dataclass
class Outcome:
    """What a finished home holds."""

    adapters: set[str]
    accounting: list[dict[str, Any] | None]
    """Of finished runs; None where the report is lost."""
    statuses: list[str]
    """Of the pipeline's MLflow runs."""
    versions: int
    leftovers: list[str] = field(default_factory=list)


class Bench:
    """A Prefect server, a home to copy and the config that all runs have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "run.yaml"
        rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}."} for n in range(_ROWS)]
        rows += [{"prompt": "Say 1.", "completion": ""}, rows[5]]  # a reject and a duplicate
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = {
            "name": NAME,
            "model": {"base_model": str(ROOT / "deploy" / "demo" / "base_model")},
            "data": {"source": str(folder / "rows.jsonl"), "max_rejected_fraction": 0.1},
            "training": {"rank": 4, "alpha": 8, "micro_batch": 4, "max_steps": 60, "checkpoint_every_steps": 8},
            "evaluation": {"max_new_tokens": 4, "num_resamples": 100, "max_examples": 8},
            "registry": {"name": NAME},
        }
        self.config.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
        self.port = _find_port()
        self.server: subprocess.Popen[bytes] | None = None

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables of a run, by which its processes are found again."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SFT_"))
        }
        return {
            **kept,
            "SFT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_HOME": str(self.folder / "prefect"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
        }

    def start_server(self) -> None:
        """Start the Prefect server and wait until it answers."""
        environment = {**self.environment(self.folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        deadline = time.monotonic() + _SERVER_START_SECONDS
        while not _answers(self.port):
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text(errors="replace")[-2000:]
            time.sleep(0.3)

    def stop_server(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the Prefect server; it is started again by `start_server`."""
        assert self.server is not None
        with suppress(ProcessLookupError):
            os.killpg(self.server.pid, number)
        if number == signal.SIGKILL:
            self.server.wait()

    def start(self, home: Path, *arguments: str) -> "Attempt":
        """Start `sft run`."""
        return Attempt(self, home, arguments)


class Attempt:
    """One start of `sft run`."""

    def __init__(self, bench: Bench, home: Path, arguments: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "flows.cli", "run", str(bench.config), *arguments]
        self._said: list[bytes] = []
        self.process = subprocess.Popen(
            command,
            env={**bench.environment(home), **_read_clock(home)},
            cwd=ROOT,
            stdout=subprocess.PIPE,  # a file would have the limits of the run's own files
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self._said.extend(iter(self.process.stdout.readline, b""))

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None when it goes on after so long."""
        try:
            return self.process.wait(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None

    def finish(self) -> int | None:
        """Return the exit code, or None when it hangs."""
        end = time.monotonic() + _PATIENCE_SECONDS
        idle_since, before = time.monotonic(), 0.0
        while (code := self.wait(5.0)) is None and time.monotonic() < end:
            spent = sum(_cpu_seconds(process) for process in _family(self.process.pid))
            if abs(spent - before) > _LEAST_CPU_SECONDS:  # less, where a process of the family has ended
                idle_since, before = time.monotonic(), spent
            if time.monotonic() - idle_since > _IDLE_SECONDS:
                break
        return code

    def signal(self, number: int) -> None:
        """Send a signal to the run and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def read(self) -> str:
        """Return what it printed."""
        if self.process.poll() is not None:
            self._listener.join(5.0)  # another process may hold the pipe
        return b"".join(list(self._said)).decode(errors="replace")


def _read_clock(home: Path) -> dict[str, str]:
    """Return the variables that let a process follow the clock of a home, where that can be."""
    return {**_CLOCK, "FAKETIME_TIMESTAMP_FILE": str(home / _CLOCK_FILE)} if CLOCK is not None else {}


@dataclass
class Draw:
    """What goes wrong, and when."""

    fault: str
    moment: float
    """Seconds after the start."""
    draw: Random


def kill(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """End the run without a word."""
    attempt.signal(signal.SIGKILL)


def terminate(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Ask the run to end, as a scheduler does; kill it when it does not."""
    attempt.process.send_signal(signal.SIGTERM)
    if attempt.wait(30) is None:
        attempt.signal(signal.SIGKILL)


def interrupt(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Press Ctrl-C."""
    attempt.signal(signal.SIGINT)


def pause(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Stop all processes for some seconds."""
    attempt.signal(signal.SIGSTOP)
    time.sleep(draw.uniform(1.0, 6.0))
    attempt.signal(signal.SIGCONT)


def stutter(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Let the processes run for a tenth of the time only, as on a disk that hardly answers."""
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        attempt.signal(signal.SIGSTOP)
        time.sleep(0.18)
        attempt.signal(signal.SIGCONT)
        time.sleep(0.02)


def fill_disk(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Leave no room on the disk until the run ends, or let files grow no further where no disk can be made."""
    if os.path.ismount(home):
        with (home / "ballast").open("wb") as file, suppress(OSError):
            while True:
                file.write(b"\0" * 65_536)
                file.flush()
    else:
        limit = draw.choice((1, 100_000, 1_000_000))
        for process in _family(attempt.process.pid):
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    attempt.finish()
    with suppress(FileNotFoundError):
        (home / "ballast").unlink()


def lose_server(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Kill the Prefect server, and bring it back after a while."""
    bench.stop_server()
    time.sleep(draw.uniform(0.0, 4.0))
    bench.start_server()


def freeze_server(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Let the Prefect server answer nothing for a while."""
    bench.stop_server(signal.SIGSTOP)
    time.sleep(draw.uniform(1.0, 8.0))
    bench.stop_server(signal.SIGCONT)


def change_clock(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Set the clock of the run's machine a day forward or an hour back, and kill the run in some of the cases."""
    (home / _CLOCK_FILE).write_text(draw.choice(("+1d", "-1h")))
    if draw.random() < 0.3:
        time.sleep(2.0)
        attempt.signal(signal.SIGKILL)


def lock_database(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Hold MLflow's or Prefect's database for half a minute, as somebody does who copies it or looks into it."""
    path = draw.choice((home / "mlflow.db", bench.folder / "prefect" / "prefect.db"))
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(_LOCK_SECONDS)
        database.execute("ROLLBACK")


def damage(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Change a file that the run has left on the disk; kill it in half of the cases."""
    files = sorted(file for name in ("cache", "results", "runs") for file in _find_files(home / name))
    if draw.random() < 0.5:
        attempt.signal(signal.SIGKILL)
    with suppress(OSError, ValueError):  # the run goes on, and may have deleted or emptied it
        if files:
            draw.choice((flip, flip, cut, delete))(draw.choice(files), draw)


def _find_files(folder: Path) -> Iterator[Path]:
    """Give the finished files below a folder in which a run works; what it still writes has no digest yet."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "new" and not name.startswith(".partial-")]
        for file in (Path(place) / name for name in names if name != "lock"):
            with suppress(OSError):
                if file.stat().st_size:
                    yield file


def clear(bench: Bench, home: Path, attempt: Attempt, draw: Random) -> None:
    """Delete a part of the home under a run, as somebody who needs room does."""
    name = draw.choice(("cache", "results", "runs", "cache", "artifacts"))
    shutil.rmtree(home / name, ignore_errors=True)


FAULTS: dict[str, Callable[[Bench, Path, Attempt, Random], None]] = {
    each.__name__: each
    for each in (
        *(kill, terminate, interrupt, pause, stutter),
        *(fill_disk, lose_server, freeze_server, damage, clear, lock_database),
        *((change_clock,) if CLOCK is not None else ()),
    )
}


def run_draw(bench: Bench, template: Path, expected: Outcome, drawn: Draw) -> list[str]:
    """Let a fault happen, start again until it is done, and return the laws that are broken."""
    broken: list[str] = []
    with _new_home(bench.folder, template) as home:
        attempt = bench.start(home)
        if attempt.wait(drawn.moment) is None:
            FAULTS[drawn.fault](bench, home, attempt, drawn.draw)
        code = attempt.finish()
        if code is None:
            attempt.signal(signal.SIGKILL)
            broken.append(f"hangs: {attempt.read()[-500:]}")
        refused = 0
        # A run that had finished before the fault came is done: started again, it would be another one.
        while code != 0 and refused < 3 and "FINISHED" not in read_home(bench, home).statuses:
            if code == 1:
                refused += 1
                if "Traceback" in attempt.read():
                    broken.append(f"traceback: {attempt.read()[-700:]}")
            elif code not in (None, -2, -9, -15, 130, 143):
                broken.append(f"exit code {code}: {attempt.read()[-500:]}")
            attempt = bench.start(home)
            if (code := attempt.finish()) is None:
                attempt.signal(signal.SIGKILL)
                return [*broken, f"the next start hangs: {attempt.read()[-500:]}"]
        if code != 0 and "FINISHED" not in read_home(bench, home).statuses:
            return [*broken, f"does not recover: {attempt.read()[-900:]}"]
        return broken + compare(read_home(bench, home), expected, refused, may_lack=drawn.fault == clear.__name__)


def compare(found: Outcome, expected: Outcome, refused: int, *, may_lack: bool = False) -> list[str]:
    """Return the laws that are broken.

    Args:
        found: in the home.
        expected: of an undisturbed run.
        refused: how often the run ended in words.
        may_lack: the artifacts of a finished run may have been deleted by hand.
    """
    broken = []
    if found.adapters != expected.adapters and not (may_lack and found.adapters <= {*expected.adapters, LOST}):
        broken.append(f"adapters {found.adapters}, undisturbed {expected.adapters}")
    allowed = [expected.accounting[0], *([None] if may_lack else [])]
    if any(counts not in allowed for counts in found.accounting):
        broken.append(f"accounting {found.accounting}, undisturbed {expected.accounting}")
    finished, failed = found.statuses.count("FINISHED"), found.statuses.count("FAILED")
    if finished != 1 or failed > refused or finished + failed != len(found.statuses):
        broken.append(f"MLflow runs {found.statuses} after {refused} refusals")
    if not 1 <= found.versions <= 1 + failed:
        broken.append(f"{found.versions} versions")
    return broken + found.leftovers


def read_home(bench: Bench, home: Path) -> Outcome:
    """Return what runs have left in a home, read by a process that knows of no other."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.laboratory.crashes", "--read"],
        env=bench.environment(home),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    values = json.loads(done.stdout.splitlines()[-1])
    outcome = Outcome(set(values["adapters"]), values["accounting"], values["statuses"], values["versions"])
    outcome.leftovers = [f"file {path}" for path in _find_leftovers(home)] + describe_processes(_find_processes(home))
    return outcome


def _print_home() -> None:
    from tasks import tracking
    from tests.laboratory.reading import read_outcome

    tracking.client()
    print(json.dumps(read_outcome(NAME)))


def _find_leftovers(home: Path) -> list[Path]:
    halves = [*(home / "cache" / "new").glob("*"), *(home / "runs").rglob(".partial-*"), *home.rglob("*.tmp")]
    return sorted(halves)


def _find_processes(home: Path) -> list[psutil.Process]:
    """Return the processes that a run of this home has started and that live on after it."""
    end = time.monotonic() + _ENDING_SECONDS
    while (found := _list_processes(home)) and time.monotonic() < end:  # they may be about to end
        time.sleep(0.2)
    return found


def describe_processes(processes: list[psutil.Process]) -> list[str]:
    """Return what is known of processes; one that ends meanwhile is none that is left behind."""
    lines = []
    for process in processes:
        with suppress(psutil.Error):
            lines.append(f"process {process.pid} {process.cmdline()}")
    return lines


def _list_processes(home: Path) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("SFT_HOME") == str(home):
                found.append(process)
    return found


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return sum(process.cpu_times()[:2])
    return 0.0


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def _new_home(folder: Path, template: Path) -> Iterator[Path]:
    """Give a home with an empty tracking database, on a small disk of its own where that is allowed."""
    home = Path(tempfile.mkdtemp(dir=folder, prefix="home-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(home)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        shutil.copytree(template, home, dirs_exist_ok=True)
        (home / _CLOCK_FILE).write_text("+0")
        yield home
    finally:
        for process in _list_processes(home):
            with suppress(psutil.Error):
                process.kill()
        if mounted:
            subprocess.run(["umount", "-l", str(home)], check=True)
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def prepared(folder: Path) -> Iterator[tuple[Bench, Path, Outcome, float]]:
    """Give the bench, a home to copy, the undisturbed outcome, and how long an undisturbed run takes in seconds."""
    bench = Bench(folder)
    bench.start_server()
    try:
        template = folder / "template"
        template.mkdir()
        made = subprocess.run(
            [sys.executable, "-c", "from tasks import tracking; tracking.open_experiment('empty')"],
            env=bench.environment(template),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr[-2000:]
        with _new_home(folder, template) as home:
            began = time.monotonic()
            attempt = bench.start(home)
            assert attempt.finish() == 0, attempt.read()[-2000:]
            seconds = time.monotonic() - began
            expected = read_home(bench, home)
        assert expected.leftovers == [], expected.leftovers
        yield bench, template, expected, seconds
    finally:
        bench.stop_server()


def draw_fault(seed: int, seconds: float, fault: str | None = None) -> Draw:
    """Draw a fault and its moment within a run that takes so many seconds."""
    draw = Random(seed)
    chosen = draw.choice(list(FAULTS))
    return Draw(fault or chosen, draw.uniform(0.1, 1.05) * seconds, draw)


def main() -> int:
    """Run the draws, print each with what it broke, and return 1 where something is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--fault", choices=list(FAULTS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no draw after so long")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        _print_home()
        return 0
    counts: Counter[tuple[str, bool]] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sft-crashes-") as folder, prepared(Path(folder)) as bench:
        print(f"seed {options.seed}; an undisturbed run takes {bench[3]:.1f} s: {bench[2]}", flush=True)
        for number in range(options.first, options.first + options.draws):
            if time.monotonic() - began > options.seconds:
                break
            drawn = draw_fault(options.seed * 1_000_000 + number, bench[3], options.fault)
            broken = run_draw(bench[0], bench[1], bench[2], drawn)
            counts[drawn.fault, not broken] += 1
            print(f"{number}: {drawn.fault} after {drawn.moment:.1f} s: {'; '.join(broken) or 'recovered'}", flush=True)
    for (fault, whole), count in sorted(counts.items()):
        print(f"{fault:14} {'recovered' if whole else 'BROKEN':10} {count:4}")
    print(f"{counts.total()} draws of seed {options.seed} in {time.monotonic() - began:.0f} s")
    return 1 if any(not whole for _, whole in counts) else 0


def _find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(port: int) -> bool:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
