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
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.laboratory.bench import LOST, NAME, ROOT, Bench, new_home
from tests.laboratory.faults import FAULTS, change_clock, clear
from tests.laboratory.processes import describe_processes, find_processes


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


@dataclass
class Draw:
    """What goes wrong, and when."""

    fault: str
    moment: float
    """Seconds after the start."""
    draw: Random

    @property
    def follows_clock(self) -> bool:
        """Whether its runs follow the clock of their home."""
        return needs_clock(self.fault)


@dataclass(frozen=True)
class Undisturbed:
    """Runs in which nothing goes wrong."""

    outcome: Outcome
    seconds: dict[bool, float]
    """That one takes; True: by the clock of its home, where a fault was going to need that."""


def needs_clock(fault: str) -> bool:
    """Say whether a fault sets the clock of the home."""
    return fault == change_clock.__name__


def run_draw(bench: Bench, template: Path, expected: Outcome, drawn: Draw) -> list[str]:
    """Let a fault happen, start again until it is done, and return the laws that are broken."""
    broken: list[str] = []
    with new_home(bench.folder, template) as home:
        attempt = bench.start(home, follows_clock=drawn.follows_clock)
        if attempt.wait(drawn.moment) is None:
            FAULTS[drawn.fault](bench, home, attempt, drawn.draw)
        code = attempt.finish()
        if code is None:
            attempt.signal(signal.SIGKILL)
            broken.append(f"hangs: {attempt.read()[-500:]}")
        refused = 0
        # A run that had finished before the fault came is done: started again, it would be another one.
        while code != 0 and refused < 3 and not has_finished(home):
            if code == 1:
                refused += 1
                if "Traceback" in attempt.read():
                    broken.append(f"traceback: {attempt.read()[-700:]}")
            elif code not in (None, -2, -9, -15, 130, 143):
                broken.append(f"exit code {code}: {attempt.read()[-500:]}")
            attempt = bench.start(home, follows_clock=drawn.follows_clock)
            if (code := attempt.finish()) is None:
                attempt.signal(signal.SIGKILL)
                return [*broken, f"the next start hangs: {attempt.read()[-500:]}"]
        if code != 0 and not has_finished(home):
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


def has_finished(home: Path) -> bool:
    """Say whether a pipeline run of a home has finished, by its database alone: MLflow takes seconds to be imported."""
    path = home / "mlflow.db"
    if not path.exists():
        return False
    with closing(sqlite3.connect(path, timeout=60)) as database:
        (number,) = database.execute(
            "SELECT count(*) FROM runs JOIN tags USING (run_uuid) WHERE status = 'FINISHED' AND key = ?",
            ("sft.config_digest",),
        ).fetchone()
    return bool(number)


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
    outcome.leftovers = [f"file {path}" for path in _find_leftovers(home)] + describe_processes(find_processes(home))
    return outcome


def _print_home() -> None:
    from tasks import tracking
    from tests.laboratory.reading import read_outcome

    tracking.client()
    print(json.dumps(read_outcome(NAME)))


def _find_leftovers(home: Path) -> list[Path]:
    halves = [*(home / "cache" / "new").glob("*"), *(home / "runs").rglob(".partial-*"), *home.rglob("*.tmp")]
    return sorted(halves)


@contextmanager
def prepared(folder: Path, faults: Collection[str]) -> Iterator[tuple[Bench, Path, Undisturbed]]:
    """Give the bench, a home to copy, and what undisturbed runs give and take, for faults that are going to happen."""
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
        ways = sorted({needs_clock(fault) for fault in faults})
        runs = {follows: _run_undisturbed(bench, template, follows_clock=follows) for follows in ways}
        first, *others = [outcome for outcome, _ in runs.values()]
        assert all(compare(other, first, 0) == [] for other in others), runs
        yield bench, template, Undisturbed(first, {follows: seconds for follows, (_, seconds) in runs.items()})
    finally:
        bench.stop_server()


def _run_undisturbed(bench: Bench, template: Path, *, follows_clock: bool) -> tuple[Outcome, float]:
    """Run once, and return what has come out and how many seconds it took."""
    with new_home(bench.folder, template) as home:
        began = time.monotonic()
        attempt = bench.start(home, follows_clock=follows_clock)
        assert attempt.finish() == 0, attempt.read()[-2000:]
        seconds = time.monotonic() - began
        outcome = read_home(bench, home)
    assert outcome.leftovers == [], outcome.leftovers
    return outcome, seconds


def draw_fault(seed: int, fault: str | None = None) -> tuple[str, Random]:
    """Draw a fault, where none is given; return it with what its moment and the rest are drawn from."""
    draw = Random(seed)
    chosen = draw.choice(list(FAULTS))
    return fault or chosen, draw


def draw_moment(fault: str, draw: Random, seconds: Mapping[bool, float]) -> Draw:
    """Draw when a fault happens to a run that takes so many seconds; see `Undisturbed`."""
    return Draw(fault, draw.uniform(0.1, 1.05) * seconds[needs_clock(fault)], draw)


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
    numbers = range(options.first, options.first + options.draws)
    faults = [draw_fault(options.seed * 1_000_000 + number, options.fault) for number in numbers]
    counts: Counter[tuple[str, bool]] = Counter()
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="sft-crashes-") as folder,
        prepared(Path(folder), [fault for fault, _ in faults]) as (bench, template, undisturbed),
    ):
        print(f"seed {options.seed}; undisturbed runs (by a clock of their own or not): {undisturbed}", flush=True)
        for number, (fault, draw) in zip(numbers, faults, strict=True):
            if time.monotonic() - began > options.seconds:
                break
            drawn = draw_moment(fault, draw, undisturbed.seconds)
            broken = run_draw(bench, template, undisturbed.outcome, drawn)
            counts[drawn.fault, not broken] += 1
            print(f"{number}: {drawn.fault} after {drawn.moment:.1f} s: {'; '.join(broken) or 'recovered'}", flush=True)
    for (fault, whole), count in sorted(counts.items()):
        print(f"{fault:14} {'recovered' if whole else 'BROKEN':10} {count:4}")
    print(f"{counts.total()} draws of seed {options.seed} in {time.monotonic() - began:.0f} s")
    return 1 if any(not whole for _, whole in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
