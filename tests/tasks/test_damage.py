"""What was changed on the disk is noticed when it is used: of a hundred damages drawn from a seed, all of them."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from schemas.artifacts import Ref
from tasks import storage, tracking
from tasks.training.checkpoints import Progress, find_checkpoint, restore_checkpoint, take_snapshot, write_snapshot
from tests.laboratory.damage import cut, delete, flip, replace_with

SEED = int(os.environ.get("SFT_SEED", "0"))
_MESSAGE = "leaves the cache"


def _write(folder: Path, number: int) -> Path:
    """Write one file of each kind that stages leave, with the number in all of them."""
    (folder / "tokenizer").mkdir(parents=True)
    rows = pl.DataFrame(
        {"example_id": [f"{number}-{n}" for n in range(50)], "input_ids": [[number, n] for n in range(50)]}
    )
    rows.write_parquet(folder / "train.parquet")
    rows.write_ipc(folder / "rows.arrow")
    save_file({"lora_A.weight": torch.full((4, 8), float(number))}, folder / "adapter_model.safetensors")
    save_file({"lm_head.weight": torch.full((64, 8), float(number))}, folder / "model-00001-of-00001.safetensors")
    (folder / "tokenizer" / "tokenizer.json").write_text(f'{{"number": {number}}}')
    return folder


@dataclass(frozen=True)
class Made:
    """A published folder, where its files lie, and another one with valid files of the same names."""

    ref: Ref
    cached: Path
    stored: Path
    other: Path


@pytest.fixture
def make(tracked: Path, tmp_path: Path) -> Callable[[int], Made]:
    run_id = str(tracking.client().create_run(tracking.open_experiment("damage")).info.run_id)
    other = _write(tmp_path / "other", -1)

    def make(number: int) -> Made:
        with storage.new_folder() as folder:
            uri, digest = tracking.publish(_write(folder / "data", number), run_id, f"data-{number}")
        ref = Ref(uri=uri, digest=digest)
        return Made(ref, tracking.resolve(ref), tracked / "artifacts" / run_id / "artifacts" / f"data-{number}", other)

    return make


def _damage(made: Made, folder: Path, draw: Random) -> str:
    file = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    name = file.relative_to(folder)
    ways = [cut, flip, flip, delete, replace_with(made.other / name)]
    way = draw.choice(ways)
    way(file, draw)
    return f"{way.__name__} {name}"


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_damage_in_the_cache_is_noticed_said_and_made_good(
    make: Callable[[int], Made], caplog: pytest.LogCaptureFixture
) -> None:
    draw, noticed = Random(SEED), []
    for number in range(60):
        made = make(number)
        whole = _read(made.cached)
        what = _damage(made, made.cached, draw)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = tracking.resolve(made.ref)
        assert _read(again) == whole, what
        assert _MESSAGE in caplog.text, what
        noticed.append(what)
    assert len(noticed) == 60
    assert list((storage.home() / "cache" / "new").iterdir()) == []


def test_every_damage_in_the_store_is_refused_where_the_cache_has_no_copy(make: Callable[[int], Made]) -> None:
    draw = Random(SEED + 1)
    for number in range(100, 140):
        made = make(number)
        what = _damage(made, made.stored, draw)
        if draw.random() < 0.5:
            what += " and " + _damage(made, made.cached, draw)
        else:
            made.cached.rename(made.cached.with_name(f"away-{number}"))
        with pytest.raises(tracking.ArtifactError, match="start the run again, which makes it again"):
            pytest.fail(f"{what} gave {tracking.resolve(made.ref)}")


def test_what_the_user_brought_is_refused_once_it_was_changed(tmp_path: Path) -> None:
    draw = Random(SEED + 2)
    for number in range(20):
        folder = _write(tmp_path / str(number), number)
        made = Made(Ref(uri=str(folder), digest=storage.digest_folder(folder)), folder, folder, tmp_path / "other")
        assert tracking.resolve(made.ref) == folder
        if number == 0:
            _write(tmp_path / "other", -1)
        _damage(made, folder, draw)
        with pytest.raises(tracking.ArtifactError, match="changed while the run was using it"):
            tracking.resolve(made.ref)


def test_a_copy_that_was_looked_at_is_not_read_again(
    make: Callable[[int], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(1000)
    time.sleep(0.1)  # files that were written a moment ago are read once more
    tracking.resolve(made.ref)
    assert tracking.resolve(made.ref) == made.cached
    monkeypatch.setattr(storage, "_digested", dict.fromkeys(storage._digested, "0" * 64))
    assert storage.cached_folder(made.ref.digest) is None  # what was remembered is believed


def test_an_equal_folder_takes_the_place_of_a_damaged_one(tmp_path: Path, tracked: Path) -> None:
    first, second = _write(tmp_path / "first", 2000), _write(tmp_path / "second", 2000)
    digest = storage.digest_folder(first)
    kept = storage.keep_folder(first, digest)
    (kept / "train.parquet").write_bytes(b"not a table")
    assert storage.keep_folder(second, digest) == kept
    assert storage.digest_folder(kept) == digest
    assert kept.is_relative_to(tracked)


def test_a_file_in_the_place_of_a_folder_is_no_copy(tmp_path: Path, tracked: Path) -> None:
    folder = _write(tmp_path / "folder", 2001)
    digest = storage.digest_folder(folder)
    place = tracked / "cache" / digest[:2] / digest
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file")
    assert storage.cached_folder(digest) is None
    assert storage.keep_folder(folder, digest) == place


def test_every_damage_of_a_checkpoint_is_noticed_and_an_older_one_taken(tmp_path: Path) -> None:
    draw = Random(SEED + 3)
    for number in range(40):
        folder, elsewhere = tmp_path / str(number), tmp_path / f"other-{number}"
        state = _save(folder, 3, seed=number)
        newest = _save(folder, 6, seed=number)
        other = _save(elsewhere, 6, seed=number + 1000)
        file = draw.choice(sorted(newest.iterdir()))
        ways = [cut, flip, delete] + ([replace_with(other / file.name)] if file.name != "digests.json" else [])
        way = draw.choice(ways)
        way(file, draw)
        found, warnings = find_checkpoint(folder, "this run")
        assert found == state, f"{way.__name__} {file.name}"
        assert "step-000006 is damaged" in warnings[0]


def test_a_checkpoint_under_another_step_s_name_is_damaged(tmp_path: Path) -> None:
    _save(tmp_path, 3, seed=0).rename(tmp_path / "step-000009")
    found, warnings = find_checkpoint(tmp_path, "this run")
    assert found is None
    assert "it holds step 3" in warnings[0]


def _save(folder: Path, step: int, *, seed: int) -> Path:
    torch.manual_seed(seed + step)
    parameters = {"a": torch.nn.Parameter(torch.randn(3, 4))}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.1)
    (parameters["a"] * torch.randn(3, 4)).sum().backward()
    optimizer.step()
    snapshot = take_snapshot(
        parameters=parameters,
        optimizer=optimizer,
        progress=Progress(step=step, losses=[0.5 + seed] * step),
        identity="this run",
    )
    assert snapshot is not None
    path = write_snapshot(snapshot, folder, keep=3)
    assert restore_checkpoint(path, parameters=parameters, optimizer=optimizer).step == step
    return path
