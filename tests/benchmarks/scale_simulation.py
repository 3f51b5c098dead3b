"""What a run costs at more rows and machines than are here: the scheduler simulated, measured rates for the rest.

    python -m tests.benchmarks.scale_simulation             the tables of docs/scale.md

`simulate` goes through the events of `tasks.cluster.map`: calls are sent in order, two a core under way; a worker's
first call waits for its start; the calls of a lost machine are made again when the loss is noticed; the run's own
process takes results one after the other. `MEASURED` are figures of tests/benchmarks/cluster.py, `ASSUMED` are not.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

CALLS_A_CORE = 2
MOST_LOST = 5


@dataclass(frozen=True)
class Calls:
    """What is to be done."""

    number: int
    seconds: float
    """Of a call on one core, in the median."""
    spread: float = 0.0
    """Standard deviation of the logarithm of that."""
    slow_fraction: float = 0.0
    slow_factor: float = 1.0
    """That part of the calls takes so many times longer: stragglers."""
    head_seconds: float = 0.0
    """That the run's process takes for what a call made."""


@dataclass(frozen=True)
class Machines:
    """What does it."""

    number: int
    cores: int
    """Of each."""
    start_seconds: float = 0.0
    """Of a worker before its first call."""
    lost_per_hour: float = 0.0
    """How often each machine is lost."""
    notice_seconds: float = 15.0
    return_seconds: float = 300.0
    """Until another one is there."""


@dataclass
class Outcome:
    """How it went."""

    seconds: float = 0.0
    num_made: int = 0
    """Calls that were begun, again after a loss too."""
    num_machines_lost: int = 0
    failed: bool = False
    """A call was lost more often than it is made again."""


@dataclass
class _State:
    calls: Calls
    machines: Machines
    draw: random.Random
    events: list[tuple[float, int, str, int, int]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=itertools.count)
    queue: deque[int] = field(default_factory=deque)
    free: list[tuple[bool, int]] = field(default_factory=list)
    """Cores without a call: whether they are cold, and their machine."""
    running: dict[int, int] = field(default_factory=dict)
    """Machine of each call."""
    attempts: dict[int, int] = field(default_factory=dict)
    num_known: int = 0
    """Machines that the run's process takes for alive."""

    def plan(self, time: float, kind: str, what: int, attempt: int = 0) -> None:
        heapq.heappush(self.events, (time, next(self.order), kind, what, attempt))

    def plan_loss(self, time: float, machine: int) -> None:
        if self.machines.lost_per_hour:
            self.plan(time + self.draw.expovariate(self.machines.lost_per_hour / 3600), "lost", machine)

    def begin(self, time: float, outcome: Outcome) -> None:
        """Give waiting calls to free cores, warm ones first."""
        while self.queue and self.free:
            is_cold, machine = heapq.heappop(self.free)
            call = self.queue.popleft()
            self.running[call] = machine
            self.attempts[call] = self.attempts.get(call, 0) + 1
            outcome.num_made += 1
            seconds = draw_seconds(self.calls, self.draw)
            start = self.machines.start_seconds if is_cold else 0.0
            self.plan(time + start + seconds, "ended", call, self.attempts[call])

    def lose(self, time: float, machine: int) -> None:
        """Take a machine away: its calls wait for the loss to be noticed."""
        self.free = [each for each in self.free if each[1] != machine]
        heapq.heapify(self.free)
        for call in [call for call, place in self.running.items() if place == machine]:
            del self.running[call]
            self.plan(time + self.machines.notice_seconds, "again", call)
        self.plan(time + self.machines.notice_seconds, "noticed", machine)
        self.plan(time + max(self.machines.return_seconds, self.machines.notice_seconds), "returned", machine)

    def join(self, time: float, machine: int) -> None:
        for _ in range(self.machines.cores):
            heapq.heappush(self.free, (True, machine))
        self.num_known += 1
        self.plan_loss(time, machine)


def draw_seconds(calls: Calls, draw: random.Random) -> float:
    """Draw how long a call takes."""
    slow = calls.slow_factor if draw.random() < calls.slow_fraction else 1.0
    return calls.seconds * slow * (math.exp(draw.gauss(0.0, calls.spread)) if calls.spread else 1.0)


def simulate(calls: Calls, machines: Machines, seed: int = 0) -> Outcome:
    """Return how long the calls take, and what is done for them."""
    outcome = Outcome()
    state = _State(calls, machines, random.Random(seed))
    for machine in range(machines.number):
        state.join(0.0, machine)
    num_sent = num_received = 0
    head_free = time = 0.0
    while num_received < calls.number:
        places = CALLS_A_CORE * machines.cores * state.num_known
        while num_sent < calls.number and num_sent - num_received < places:
            state.queue.append(num_sent)
            num_sent += 1
        state.begin(time, outcome)
        time, _, kind, what, attempt = heapq.heappop(state.events)
        if kind == "ended" and what in state.running and state.attempts[what] == attempt:
            heapq.heappush(state.free, (False, state.running.pop(what)))
            head_free = max(time, head_free) + calls.head_seconds
            state.plan(head_free, "received", what)
        elif kind == "received":
            num_received += 1
            outcome.seconds = time
        elif kind == "lost":
            outcome.num_machines_lost += 1
            state.lose(time, what)
        elif kind == "again":
            state.queue.appendleft(what)
            if state.attempts[what] > MOST_LOST:
                outcome.failed = True
                return outcome
        elif kind == "noticed":
            state.num_known -= 1
        elif kind == "returned":
            state.join(time, what)
    return outcome


@dataclass(frozen=True)
class Measured:
    """Figures of tests/benchmarks/cluster.py with rows of 460 characters, on a core of an AMD EPYC (docs/scale.md)."""

    row_bytes: float = 547
    shard_bytes: float = 16 << 20
    worker_seconds: float = 168e-6
    """Processor time of workers and of the cluster's own processes for a row, read and tokenized: 173.2 seconds for a
    million, less the run's own process's; on cores that others wanted too."""
    head_seconds: float = 5.6e-6
    """Of the run's own process: index, split and what goes where 4.3 microseconds, tokens 1.0, the way to the store
    0.3."""
    made_bytes: float = 470
    """Of a row in the tables and the tokens, of which the tables are TABLE_PART."""
    scratch_rows_bytes: float = 138
    """Of a row as a shard has it, compressed, until the tables are written."""
    scratch_sets_bytes: float = 290
    """And of its words' hashes."""
    index_row_bytes: float = 133
    """Of a row's index, which comes to the run's machine."""
    base_bytes: float = 673e6
    """Memory of the run's own process with few rows."""
    index_bytes: float = 30
    """And for each row more."""
    requests: float = 1332e-6
    """Of a row: 566 GET, 484 HEAD, 240 PUT and 42 POST for a million."""
    tokens: float = 134
    """Of a row."""
    tokens_a_second: float = 19_881.0
    """A 7B shape by LoRA on an H200 (docs/speed.md)."""


@dataclass(frozen=True)
class Assumed:
    """What was not measured."""

    cores_a_gpu: int = 16
    start_seconds: float = 10.0
    spread: float = 0.2
    slow_fraction: float = 0.01
    slow_factor: float = 5.0
    lost_per_hour: float = 0.01
    network_bytes: float = 1.25e9
    """A second, of the run's machine: 10 Gbit/s."""


MEASURED, ASSUMED = Measured(), Assumed()
TABLE_PART = 0.31
ROWS_READ, SETS_READ = 2.34, 2.0
"""How often workers read what a shard has put away."""
ROWS = (10**6, 10**8, 10**10)
GPUS = (1, 8, 64)
_GPUS_A_MACHINE = 8
_MOST_SIMULATED = 20_000


@dataclass(frozen=True)
class Cost:
    """What a run takes."""

    workers_seconds: float
    """Reading and tokenizing, where workers and the run's process work beside each other."""
    head_seconds: float
    """Of the run's process alone: index, split, what goes where, and lists of parts."""
    training_seconds: float
    """One epoch, on GPUs that share the work without a loss."""
    head_bytes: float
    requests: float
    moved_bytes: float
    """Rows twice from the store to workers (lines are counted first); what a shard has to the store, and from there its
    rows 2.34 times (once for the training part, where a third of the pieces is in two parts of the table, and once for
    the held-out one) and its sets twice; tables to the store and to workers, tokens to the store, the index to the run.
    """


def estimate(rows: int, gpus: int, measured: Measured = MEASURED, assumed: Assumed = ASSUMED) -> Cost:
    """Return what a run of so many rows costs, where data is read by the machines that have the GPUs."""
    machines = Machines(
        number=-(-gpus // _GPUS_A_MACHINE),
        cores=min(gpus, _GPUS_A_MACHINE) * assumed.cores_a_gpu,
        start_seconds=assumed.start_seconds,
        lost_per_hour=assumed.lost_per_hour,
    )
    shard_rows = measured.shard_bytes / measured.row_bytes
    comes = rows * measured.index_row_bytes / assumed.network_bytes
    scratch = (1 + ROWS_READ) * measured.scratch_rows_bytes + (1 + SETS_READ) * measured.scratch_sets_bytes
    return Cost(
        workers_seconds=spread_calls(rows / shard_rows, shard_rows * measured.worker_seconds, machines, assumed),
        head_seconds=rows * measured.head_seconds + comes,
        training_seconds=rows * measured.tokens / (measured.tokens_a_second * gpus),
        head_bytes=measured.base_bytes + rows * measured.index_bytes,
        requests=rows * measured.requests,
        moved_bytes=rows
        * (2 * measured.row_bytes + scratch + (1 + TABLE_PART) * measured.made_bytes + measured.index_row_bytes),
    )


def spread_calls(number: float, seconds: float, machines: Machines, assumed: Assumed) -> float:
    """Return how long calls take; of very many, some are simulated, and the time is that times the rest."""
    simulated = max(1, min(math.ceil(number), _MOST_SIMULATED))
    calls = Calls(simulated, seconds, assumed.spread, assumed.slow_fraction, assumed.slow_factor)
    return simulate(calls, machines).seconds * max(1.0, number / simulated)


def describe_costs() -> list[str]:
    """Return the table of costs."""
    lines = [
        "| rows | GPUs | workers | the run's own process | training, one epoch | its memory | requests | bytes moved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rows, gpus in itertools.product(ROWS, GPUS):
        cost = estimate(rows, gpus)
        times = (cost.workers_seconds, cost.head_seconds, cost.training_seconds)
        shown = [f"10^{round(math.log10(rows))}", str(gpus), *map(show_time, times), show_bytes(cost.head_bytes)]
        lines.append(f"| {' | '.join([*shown, f'{cost.requests:,.0f}', show_bytes(cost.moved_bytes)])} |")
    return lines


def describe_troubles() -> list[str]:
    """Return the table of what stragglers, cold starts and losses cost: 10^9 rows on eight machines."""
    shard_rows = MEASURED.shard_bytes / MEASURED.row_bytes
    number, seconds = math.ceil(10**9 / shard_rows), shard_rows * MEASURED.worker_seconds
    calm, cold = Machines(8, 16), Machines(8, 16, start_seconds=60.0)
    lost = [Machines(8, 16, 60.0, lost_per_hour=rate) for rate in (2.0, 6.0)]
    cases = {
        "nothing happens": (Calls(number, seconds), calm),
        "a worker takes 60 s to start": (Calls(number, seconds), cold),
        "and a call in a hundred takes ten times as long": (Calls(number, seconds, 0.2, 0.01, 10.0), cold),
        "and each machine is lost twice an hour": (Calls(number, seconds, 0.2, 0.01, 10.0), lost[0]),
        "and each six times an hour": (Calls(number, seconds, 0.2, 0.01, 10.0), lost[1]),
    }
    lines = [
        "| 10^9 rows, eight machines of 16 cores | time | calls made | machines lost |",
        "| --- | --- | --- | --- |",
    ]
    for name, (calls, machines) in cases.items():
        found = simulate(calls, machines)
        time = "fails" if found.failed else f"{found.seconds:,.0f} s"
        lines.append(f"| {name} | {time} | {found.num_made:,} of {number:,} | {found.num_machines_lost} |")
    return lines


def show_time(seconds: float) -> str:
    """Return a duration in the unit that people would take."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def show_bytes(size: float) -> str:
    """Return a size in the unit that people would take."""
    for unit, bytes_ in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if size >= bytes_:
            return f"{size / bytes_:,.1f} {unit}"
    return f"{size / 1e6:,.0f} MB"


def main() -> None:
    print("\n".join([*describe_costs(), "", *describe_troubles()]))


if __name__ == "__main__":
    main()
