"""Batches of parts that are read when needed are those of everything in memory, and few parts are held."""

from pathlib import Path
from typing import Any

import pytest

from schemas.config import TrainingConfig
from tasks.training import step_plans
from tasks.training.micro_batches import iterate_steps
from tasks.training.token_parts import PartCounts
from tests.tasks.training.parts.token_parts import (
    CONFIG,
    NUM_PARTS,
    describe,
    list_steps,
    open_lazily,
    open_whole,
    write_parts,
)

CASES: list[dict[str, Any]] = [
    {"packing": True, "tokens_per_pack": 64},
    {"packing": False},
    {"packing": True, "weighs": True},
    {"packing": False, "weighs": True},
    {"packing": False, "objective": "dpo"},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turn", [(0, 1), (1, 2), (2, 3)])
def test_batches_are_those_of_everything_in_memory(tmp_path: Path, case: dict[str, Any], turn: tuple[int, int]) -> None:
    settings = {name: value for name, value in case.items() if name != "weighs"}
    config = TrainingConfig.model_validate({**CONFIG.model_dump(), **settings})
    tokens = write_parts(tmp_path / "tokens", is_paired=config.is_paired, weighs="weighs" in case)
    lazy = open_lazily(tokens, tmp_path / "lazy", config)
    whole = open_whole(tokens / "train.parquet", tmp_path, tmp_path, config)
    assert list(lazy[1]) == list(whole[1])
    assert lazy[0].find_highest() == whole[0].find_highest()
    assert lazy[0].trained.tolist() == whole[0].trained.tolist()
    steps, expected = (list_steps(found, config, turn) for found in (lazy, whole))
    assert [describe(step) for step in steps] == [describe(step) for step in expected]
    assert any(batch.is_elsewhere for step in steps for batch in step) == (turn[1] > 1)
    lazy[0].parts.close()
    assert not (tmp_path / "lazy" / "parts").exists()


@pytest.mark.parametrize("weighs", [False, True])
def test_ranks_together_form_every_row_once_and_know_the_sums(tmp_path: Path, weighs: bool) -> None:
    config = CONFIG.model_copy(update={"packing": True, "tokens_per_pack": 64})
    tokens = write_parts(tmp_path / "tokens", weighs=weighs)
    alone = list_steps(open_lazily(tokens, tmp_path / "alone", config), config)
    for count in (2, 3):
        ranks = [
            list_steps(open_lazily(tokens, tmp_path / f"{count}-{number}", config), config, (number, count))
            for number in range(count)
        ]
        for whole, *shares in zip(alone, *ranks, strict=True):
            names = sorted(name for batch in whole for name in batch.example_ids)
            own = [[batch for batch in share if not batch.is_elsewhere] for share in shares]
            if all(len(each) < len(share) for each, share in zip(own, shares, strict=True)):
                assert sorted(name for each in own for batch in each for name in batch.example_ids) == names
                assert len({batch.dropout_key for each in own for batch in each}) == sum(map(len, own))
            else:  # the few rows that end an epoch are formed by every rank
                assert all(sorted(name for batch in each for name in batch.example_ids) == names for each in own)
            for share in shares:
                for counted in ("num_tokens", "num_trained_tokens", "total_weight"):
                    sums = [sum(getattr(batch, counted) for batch in batches) for batches in (whole, share)]
                    assert sums[0] == pytest.approx(sums[1], rel=1e-12)


def test_a_rank_holds_few_parts_and_its_disk_as_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_plans, "MOST_PARTS", 4)
    monkeypatch.setattr(step_plans, "STEPS_AHEAD", 4)
    tokens = write_parts(tmp_path / "tokens")
    table, rows = open_lazily(tokens, tmp_path, CONFIG)
    on_disk = []
    for _ in iterate_steps(table, rows, CONFIG, seed=5, first=0, last=-(-len(rows) // 8)):
        on_disk.append(len(list((tmp_path / "parts").glob("*/made"))))
    counts: PartCounts = table.parts.counts
    assert counts.numbers == set(range(NUM_PARTS)) - {5}
    # A step at the border of two windows has parts of both: six.
    assert 3 <= counts.most_at_once <= 6
    assert max(on_disk) <= 6
    assert counts.laid_out <= NUM_PARTS  # the first once more, for the trial before the first step
    assert not list((tmp_path / "parts").glob("*/made"))
