"""The simulated scheduler takes as long as the real one, and the page says what it says."""

import os
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tasks import execution
from tasks.cluster_connection import ADDRESS
from tasks.parcels import Parcel
from tests.benchmarks.scale_simulation import Calls, Machines, describe_costs, describe_troubles, simulate
from tests.tasks.cluster_calls import rest
from tests.tasks.cluster_nodes import start_nodes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("calls", "machines", "seconds"),
    [
        (Calls(4, 1.0), Machines(1, 2), 2.0),
        (Calls(5, 1.0), Machines(2, 1), 3.0),
        (Calls(4, 1.0), Machines(1, 2, start_seconds=3.0), 5.0),  # each core starts once
        (Calls(10, 1.0, head_seconds=2.0), Machines(1, 2), 21.0),  # a second until there is a result, and two for each
    ],
)
def test_calls_take_what_can_be_said_by_hand(calls: Calls, machines: Machines, seconds: float) -> None:
    found = simulate(calls, machines)
    assert (found.seconds, found.num_made, found.failed) == (seconds, calls.number, False)


def test_what_a_lost_machine_had_is_made_again_and_takes_longer() -> None:
    calls = Calls(2000, 10.0)
    calm, lossy = simulate(calls, Machines(4, 8)), simulate(calls, Machines(4, 8, lost_per_hour=6.0))
    assert calm.seconds == 630.0  # 63 rounds of 32
    assert lossy.num_machines_lost > 1
    assert 2000 < lossy.num_made <= 2000 + 8 * lossy.num_machines_lost
    assert 630.0 < lossy.seconds < 2 * 630.0
    assert simulate(Calls(100, 3600.0), Machines(4, 8, lost_per_hour=60.0)).failed


@pytest.mark.skipif(find_spec("ray") is None, reason="the ray extra is not installed")
def test_a_cluster_takes_as_long_as_the_simulation_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tasks' / 'unimported'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-the-tests-with-32-letters")
    monkeypatch.setenv("SFT_HOME", str(tmp_path))
    with start_nodes(2) as nodes:
        monkeypatch.setenv(ADDRESS, nodes.address)
        try:
            execution.map(rest, [(0.5,)] * 4, parcel=lambda _: Parcel(()))  # both workers are warm then
            begin = time.monotonic()
            execution.map(rest, [(2.0,)] * 9, parcel=lambda _: Parcel(()))
            seconds = time.monotonic() - begin
        finally:
            execution.stop()
    expected = simulate(Calls(9, 2.0), Machines(2, 1)).seconds
    assert expected == 10.0
    assert expected <= seconds < 1.3 * expected


def test_the_page_has_the_tables_that_are_printed() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for table in (describe_costs(), describe_troubles()):
        assert "\n".join(table) in page
