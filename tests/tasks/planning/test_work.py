"""The plan's passes are those that the training makes, for each layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.config import TrainingConfig
from tasks.decoder.passes import RecordingRule, Shape
from tasks.planning.work import PassLayout, foresee_layout, foresee_work, read_examples
from tasks.training.micro_batches import form_flat_step, form_padded_step, iterate_steps
from tasks.training.pace import count_tokens
from tasks.training.rows import lay_out, open_rows
from tasks.training.schedule import count_steps
from tasks.training.step_work import count_work
from tests.tasks.planning.test_sizes import write_split

FLAT, PADDED = PassLayout(is_flat=True, tokens_per_forward=1500), PassLayout(is_flat=False, tokens_per_forward=4000)
RECORDED = replace(FLAT, recording=RecordingRule(most_tokens=1280, longest=960, room_tokens=1 << 16))


@pytest.mark.parametrize("layout", [FLAT, PADDED, RECORDED], ids=["flat", "padded", "recorded"])
@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 5, "num_epochs": 2.5},
        {"micro_batch": 2, "gradient_accumulation_steps": 3, "max_steps": 20},
        {"packing": True, "tokens_per_pack": 1024, "micro_batch": 2},
    ],
    ids=["epochs", "accumulated", "packs"],
)
def test_the_work_is_that_of_the_training(tmp_path: Path, layout: PassLayout, settings: dict[str, Any]) -> None:
    lengths = np.random.default_rng(3).integers(4, 900, 300).tolist()
    split = write_split(tmp_path / "train.parquet", lengths)
    config = TrainingConfig.model_validate(settings)
    found = foresee_work(read_examples(split, config), config, layout, seed=9)
    lay_out(split, tmp_path / "laid", config)
    table, rows = open_rows(tmp_path / "laid")
    _, num_steps = count_steps(len(rows), config)

    def form(table: Any, rows: Any) -> Any:
        if layout.is_flat:
            return form_flat_step(table, rows, layout.tokens_per_forward)
        return form_padded_step(table, rows, config.micro_batch, layout.tokens_per_forward)

    steps = iterate_steps(table, rows, config, seed=9, first=0, last=num_steps, form_step=form)
    recorded: set[Shape] = set()
    counted = [count_work(batches, layout.recording, recorded) for batches in steps]
    assert found["steps"] == num_steps == len(counted)
    for name in ("passes", "tokens", "squares", "head_rows", "replayed"):
        assert found[name] == sum(each[name] for each in counted), name
    assert found["new_shapes"] == sum(each["new_shapes"] for each in counted[1:])
    assert (found["replayed"] > 0) == (len(recorded) > 1) == (layout is RECORDED)
    assert found["replayed"] < found["passes"] or config.packing
    assert found["largest_pass"] == max(each["largest_pass"] for each in counted)


def test_ranks_that_share_examples_take_the_same_passes(tmp_path: Path) -> None:
    lengths = np.random.default_rng(5).integers(4, 900, 200).tolist()
    split = write_split(tmp_path / "train.parquet", lengths)
    config = TrainingConfig(micro_batch=8, num_epochs=1, num_processes=4, context_parallel=2)
    examples = read_examples(split, config)
    layout = foresee_layout(examples, config, is_gpu=False)
    alone = foresee_layout(examples, TrainingConfig(micro_batch=8), is_gpu=False)
    assert layout.tokens_per_forward == 2 * alone.tokens_per_forward
    found = foresee_work(examples, config, layout, seed=9)
    lay_out(split, tmp_path / "laid", config)
    table, rows = open_rows(tmp_path / "laid")
    _, num_steps = count_steps(len(rows), config)

    def form(table: Any, rows: Any) -> Any:
        return form_flat_step(table, rows, layout.tokens_per_forward, num_parts=2)  # two groups of two ranks

    counted = [
        count_work(batches)
        for batches in iterate_steps(table, rows, config, seed=9, first=0, last=num_steps, form_step=form)
    ]
    for name in ("passes", "tokens", "squares", "head_rows"):
        assert found[name] == sum(each[name] for each in counted), name
    assert (found["ranks"], found["sharing"]) == (4, 2)


def test_a_table_in_parts_is_counted_as_one(tmp_path: Path) -> None:
    lengths = np.random.default_rng(4).integers(4, 90, 60).tolist()
    whole = write_split(tmp_path / "whole.parquet", lengths)
    (tmp_path / "train.parquet").mkdir()
    for number, part in enumerate((lengths[:25], lengths[25:])):
        write_split(tmp_path / "train.parquet" / f"{number:06d}.parquet", part)
    config = TrainingConfig(micro_batch=4)
    found, expected = (read_examples(path, config) for path in (tmp_path / "train.parquet", whole))
    assert found.table.offsets.tolist() == expected.table.offsets.tolist()
    assert count_tokens(tmp_path / "train.parquet") == sum(lengths)
    assert count_tokens(tmp_path / "nowhere.parquet") == 0
