"""A few dozen inputs of a new seed, which is printed: each is done, or refused by an error of ours."""

import os
from pathlib import Path
from random import Random

import pytest

from tests.laboratory.fuzz import KINDS, RIGHT, run_cases
from tests.laboratory.inputs import draw_config, draw_template

NUM_CASES = 40


def test_drawn_inputs_end_well() -> None:
    seed = int(os.environ.get("SFT_SEED") or int.from_bytes(os.urandom(4), "big"))
    print(f"seed {seed}")  # shown where the test fails
    cases = [(KINDS[number % len(KINDS)], seed * 1_000_000 + number) for number in range(NUM_CASES)]
    ended = list(run_cases(cases))
    assert len(ended) == NUM_CASES
    assert [f"{way}: --case {kind}:{number}: {said}" for kind, number, way, said in ended if way not in RIGHT] == []


def test_a_dead_process_a_hang_and_a_traceback_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.laboratory.fuzz.HANG_SECONDS", 6.0)
    cases = [("traceback", 0), ("unaccounted", 0), ("crash", 0), ("hang", 0)]
    assert [way for _, _, way, _ in run_cases(cases)] == ["traceback", "unaccounted", "dead process", "hang"]


def test_a_seed_draws_the_same_input_again(tmp_path: Path) -> None:
    for draw_file in (draw_config, draw_template):
        contents = []
        for name in ("one", "two"):
            folder = tmp_path / draw_file.__name__ / name
            folder.mkdir(parents=True)
            contents.append(draw_file(folder, Random(5)).read_bytes())
        assert contents[0] == contents[1]
