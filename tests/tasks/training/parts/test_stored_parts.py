"""Ranks fetch the parts of their own batches only, each once."""

import os
from pathlib import Path

import pytest

from tasks.training import order
from tasks.training.checkpoints import Progress
from tasks.training.loop import train_adapter
from tasks.training.place import open_place
from tasks.training.preparation import prepare_training
from tasks.training.process.messages import TrainingJob
from tasks.training.process.team import find_offer, leading, prepare_job, take_offer
from tasks.training.records import TrainingError
from tasks.training.steps import Run, do_step, iterate
from tasks.training.token_parts import PartCounts
from tests.object_store import KEYS
from tests.tasks.training.parts.token_parts import (
    CONFIG,
    GROUPS_PER_WINDOW,
    NUM_PARTS,
    NUM_STEPS,
    Stored,
    describe,
    list_steps,
    open_lazily,
    write_parts,
)
from tests.tasks.training.ranks import find_port, on_two_ranks


def do_steps(
    number: int, base_model: Path, tokens: Path, folder: Path, address: str, endpoint: str, num_steps: int
) -> tuple[list[float], PartCounts, int]:
    """Do steps as the only rank of one of two machines; return losses, what of the parts was read, and work counted."""
    order.GROUPS_PER_WINDOW = GROUPS_PER_WINDOW
    os.environ.update({**KEYS, "AWS_ENDPOINT_URL": endpoint, "LOCAL_RANK": "0", "GROUP_RANK": str(number)})
    place = folder / f"machine-{number}"
    setup = prepare_training(base_model, tokens, place, CONFIG, seed=5, tokens_address=address)
    run = Run(setup, Progress(), "x")
    steps, losses, tokens_seen = iterate(run), [], 0
    for _ in range(num_steps):
        record, steps = do_step(run, steps)
        losses.append(record.loss)
        tokens_seen += record.num_tokens
    steps.close()  # type: ignore[attr-defined]
    setup.table.parts.close()
    return losses, setup.table.parts.counts, tokens_seen


def test_two_ranks_fetch_the_parts_of_their_own_batches_only(base_model: Path, tmp_path: Path, stored: Stored) -> None:
    tokens, address, _, traffic = stored
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    alone = do_steps(0, base_model, tokens, tmp_path / "alone", address, endpoint, NUM_STEPS)
    (tmp_path / "two").mkdir()
    once = traffic.requests.copy()
    assert set(once.values()) <= {1, 2}  # the first part once more: the trial reads it before the first step
    assert alone[1].fetched == sum(once.values())
    traffic.clear()
    given = (base_model, tokens, tmp_path / "two", address, endpoint, NUM_STEPS)
    ranks = on_two_ranks(do_steps, *given, folder=tmp_path / "ranks")
    for losses, counts, num_tokens in ranks:
        assert losses == pytest.approx(alone[0], abs=1e-5)
        assert num_tokens == alone[2]
        assert counts.fetched == counts.laid_out
    assert sum(traffic.requests.values()) == sum(counts.fetched for _, counts, _ in ranks)
    # Eleven parts have rows. Of a window's three, a rank with half of the lanes reads two or, at the border, all.
    assert set.union(*(counts.numbers for _, counts, _ in ranks)) == set(range(NUM_PARTS)) - {5}
    assert sum(len(counts.numbers) for _, counts, _ in ranks) < 2 * 11
    assert sum(counts.fetched_bytes for _, counts, _ in ranks) < 1.7 * alone[1].fetched_bytes


def test_in_few_steps_only_the_parts_of_a_window_are_fetched(base_model: Path, tmp_path: Path, stored: Stored) -> None:
    tokens, address, _, traffic = stored
    config = CONFIG.model_copy(update={"max_steps": 5})
    train_adapter(base_model, tokens, tmp_path / "run", config, seed=5, identity="x", tokens_address=address)
    assert len(traffic.requests) <= 4  # three of the window, and the first, by which the engine is tried out


def test_a_machine_that_joins_leaves_the_parts_where_they_are(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that machines share: it reads there those that its batches need."""
    tokens, shared = write_parts(tmp_path / "tokens"), tmp_path / "shared"
    monkeypatch.setenv("SFT_TEAM", str(shared))
    monkeypatch.setenv("SFT_RENDEZVOUS", f"127.0.0.1:{find_port()}")
    config = CONFIG.model_copy(update={"num_nodes": 2})
    place = open_place(str(shared))
    with leading(prepare_job(TrainingJob(base_model, tokens, tmp_path / "run", config, 5, "x"))):
        offer = find_offer(place)
        assert offer is not None
        for _ in range(2):  # and when it joins again
            job = take_offer(place, offer, tmp_path / "guest")
            assert (job.tokens / "eval.parquet").is_file()
            assert not (job.tokens / "train.parquet").exists()
    assert job.tokens_address is not None
    found = open_lazily(job.tokens, tmp_path / "there", config, job.tokens_address)
    expected = list_steps(open_lazily(tokens, tmp_path / "here", config), config)
    assert [describe(step) for step in list_steps(found, config)] == [describe(step) for step in expected]
    part = Path(job.tokens_address) / "train.parquet" / "000004.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(TrainingError, match=rf"{part} is damaged: its sha256 is not"):
        list_steps(open_lazily(job.tokens, tmp_path / "damaged", config, job.tokens_address), config)
