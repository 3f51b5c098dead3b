"""A few faults of a new seed, which is printed: runs recover, and the undisturbed result comes out."""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import psutil
import pytest

from tasks import tracking
from tests.laboratory.bench import CLOCK, LOST, NAME
from tests.laboratory.crashes import Draw, Outcome, compare, draw_fault, draw_moment, has_finished, prepared, run_draw
from tests.laboratory.faults import FAULTS
from tests.laboratory.processes import describe_processes

pytestmark = pytest.mark.slow
_FAULTS = os.environ.get("SFT_SERVICE_TESTS", "") in ("faults", "all")
NUM_DRAWS = 5 if _FAULTS else 2
_SECONDS = 90.0


def test_runs_recover_from_drawn_faults(tmp_path: Path) -> None:
    seed = int(os.environ.get("SFT_SEED") or int.from_bytes(os.urandom(4), "big"))
    print(f"seed {seed}")  # shown where the test fails
    faults = [draw_fault(seed * 1_000_000 + number) for number in range(NUM_DRAWS)]
    broken = {}
    with prepared(tmp_path, [fault for fault, _ in faults]) as (bench, template, undisturbed):
        began = time.monotonic()
        for fault, draw in faults:
            if time.monotonic() - began > _SECONDS:  # on a busy machine fewer
                break
            drawn = draw_moment(fault, draw, undisturbed.seconds)
            if laws := run_draw(bench, template, undisturbed.outcome, drawn):
                broken[f"{fault} after {drawn.moment:.1f} s: {undisturbed.seconds}"] = laws
    assert broken == {}


@pytest.mark.skipif(not _FAULTS, reason="SFT_SERVICE_TESTS=faults")
@pytest.mark.skipif(CLOCK is None, reason="libfaketime is not installed (Debian: faketime)")
def test_a_clock_that_is_set_in_mid_run_changes_nothing(tmp_path: Path) -> None:
    with prepared(tmp_path, ["change_clock"]) as (bench, template, undisturbed):
        for seed in (0, 1):  # of the draws: a day forward, an hour back
            drawn = Draw("change_clock", undisturbed.seconds[True] * 0.6, Random(seed))
            assert run_draw(bench, template, undisturbed.outcome, drawn) == [], seed


def test_a_process_that_ends_while_it_is_looked_at_is_not_left_behind() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        print("begun", file=child.stdin, flush=True)
        assert child.stdout.readline() == "begun\n"  # a moment before, it has no command line yet
        process = psutil.Process(child.pid)
        assert describe_processes([process]) == [f"process {child.pid} ['cat']"]
        child.kill()
    assert describe_processes([process]) == []


def test_every_fault_is_drawn_and_a_seed_draws_the_same_again() -> None:
    seconds = {False: 10.0, True: 40.0}  # a run by a clock of its own takes longer, and its moments are later
    drawn, again = ([draw_moment(*draw_fault(seed), seconds) for seed in range(200)] for _ in range(2))
    assert {each.fault for each in drawn} == set(FAULTS)
    assert [(each.fault, each.moment) for each in drawn] == [(each.fault, each.moment) for each in again]
    assert max(each.moment for each in drawn if each.fault != "change_clock") < 10.5
    assert CLOCK is None or max(each.moment for each in drawn if each.fault == "change_clock") > 10.5


def test_a_run_that_has_finished_is_found_in_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert not has_finished(tmp_path)
    client, experiment = tracking.client(), tracking.open_experiment(NAME)
    run, stage = (client.create_run(experiment, tags=tags) for tags in ({tracking.CONFIG_TAG: "x"}, {}))
    client.set_terminated(stage.info.run_id)
    client.set_terminated(run.info.run_id, status="KILLED")
    assert not has_finished(tmp_path)
    client.set_terminated(run.info.run_id)
    assert has_finished(tmp_path)


def test_each_law_can_be_broken() -> None:
    counts = {"rows_in": 2, "rows_train": 2}
    expected = Outcome({"a"}, [counts], ["FINISHED"], 1)
    assert compare(expected, expected, 0) == []
    for change in (
        {"adapters": {"a", "b"}},
        {"accounting": [{**counts, "rows_train": 1}]},
        {"statuses": ["FINISHED", "RUNNING"]},
        {"statuses": ["FINISHED", "FINISHED"]},
        {"statuses": ["FINISHED", "FAILED"]},
        {"versions": 2},
        {"leftovers": ["file x"]},
    ):
        assert len(compare(replace(expected, **change), expected, 0)) == 1, change
    assert compare(replace(expected, statuses=["FINISHED", "FAILED"]), expected, 1) == []
    deleted = replace(expected, adapters={LOST}, accounting=[None])
    assert len(compare(deleted, expected, 0)) == 2
    assert compare(deleted, expected, 0, may_lack=True) == []
    assert len(compare(replace(expected, adapters={"b"}), expected, 0, may_lack=True)) == 1
