"""Trainings that were measured on H200s, each planned by the others, as `tests.benchmarks.plan` does it there.

measured/h200.jsonl has what that benchmark took: PyTorch 2.11, without FlashAttention 4. The last three are models that
the plan knows nothing of, and ran on another host than the notes that they are planned by. What went through the model
is laid out anew: the benchmark's rows are drawn from a seed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from schemas.config import TrainingConfig
from tasks import speeds
from tasks.planning import trainings
from tasks.planning.memory import count_flop
from tasks.planning.sizes import measure_sizes
from tasks.planning.times import add_up
from tasks.planning.trainings import TrainingPlan, plan_training
from tasks.planning.work import read_examples
from tasks.speeds import Speed
from tasks.training.pace import STEPS, count_tokens, describe_conditions, describe_model
from tests.benchmarks.plan import GPU, NUM_HELD_OUT, NUM_KNOWN
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.trainers import draw_lengths

MEASURED = Path(__file__).parent / "measured" / "h200.jsonl"
DEVICE = "NVIDIA H200"
COUNTED = ("steps", "passes", "tokens", "head_rows", "squares", "replayed")
TAKEN = {line["name"]: line for line in map(json.loads, MEASURED.read_text(encoding="utf-8").splitlines())}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows' lengths, with the last ones held out too, and the shapes' config.json."""
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("measured")
    kind, lengths = pl.List(pl.Int32), draw_lengths()
    ids = [[5] * (prompt + answer) for prompt, answer in lengths]
    labels = [[-100] * prompt + [7] * answer for prompt, answer in lengths]
    table = pl.DataFrame({"input_ids": pl.Series(ids, dtype=kind), "labels": pl.Series(labels, dtype=kind)})
    table.write_parquet(folder / "train.parquet")
    table.tail(NUM_HELD_OUT).write_parquet(folder / "eval.parquet")
    for shape in {shape for shape, *_ in GPU.values()}:
        settings = dict(SHAPES[shape])
        AutoConfig.for_model(settings.pop("model_type"), **settings, dtype="bfloat16").save_pretrained(folder / shape)
    return folder


@pytest.fixture(scope="module")
def plans(place: Path) -> Iterator[dict[str, TrainingPlan]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "choose_device", lambda: torch.device("cuda"))
        patch.setattr(trainings, "choose_dtype", lambda precision, device: torch.bfloat16)
        patch.setattr(trainings, "read_capacity", lambda device: 139.8 * 2**30)
        patch.setattr(speeds, "name_device", lambda: DEVICE)
        notes = {name: list_notes(name, place) for name in GPU}
        known = list(GPU)[:NUM_KNOWN]
        yield {
            name: plan(name, place, [line for other in known if other != name for line in notes[other]]) for name in GPU
        }


def read_settings(name: str, **changes: Any) -> tuple[str, TrainingConfig]:
    shape, settings, steps = GPU[name]
    return shape, TrainingConfig.model_validate({**settings, "max_steps": steps, **changes})


def plan(name: str, place: Path, known: list[Speed]) -> TrainingPlan:
    shape, config = read_settings(name)
    seen = measure_sizes(place / "train.parquet", config).seen_tokens
    return plan_training(place / shape, place, config, seed=0, known=known, seen_tokens=seen)


def list_notes(name: str, place: Path) -> list[Speed]:
    """Return what the training noted: its first step is not among its steps."""
    shape, config = read_settings(name)
    taken = TAKEN[name]
    common: dict[str, Any] = {
        "device": DEVICE, "shape": speeds.describe_shape(place / shape), "settings": describe_conditions(config),
        "engine": "fused engine",
    }  # fmt: skip
    noted = {
        "room": float(taken["room"]),
        "recomputed": taken["recomputed"],
        "flat": 1.0,
        "resident": taken["resident"],
    }
    own = [Speed(STEPS, 1.0, 1.0, **common, work={**noted, "trial": 0.0})]  # for the passes alone, of the same settings
    works = []
    for number in (config.max_steps, 1):
        _, asked = read_settings(name, max_steps=number)
        question = trainings._Question(place / shape, asked, own, torch.device("cuda"), describe_model(place / shape))
        examples = read_examples(place / "train.parquet", asked)
        works.append(
            trainings._foresee(
                question, examples, own, engine="fused engine", is_flat=True, seed=0,
                num_held_out=count_tokens(place / "eval.parquet"),
            )
        )  # fmt: skip
    whole, first = works
    work = {**whole, **{each: whole[each] - first[each] for each in COUNTED}, **noted, "trial": 0.0}
    others = [Speed(stage, units, seconds, **common) for stage, units, seconds in taken["others"]]
    steps = Speed(
        STEPS, work["tokens"], taken["seconds"], **common, flop_per_unit=count_flop(place / shape, config),
        peak_memory_bytes=taken["peak_memory_bytes"], work=work,
    )  # fmt: skip
    return [steps, *others]


@pytest.mark.parametrize("name", list(GPU))
def test_steps_are_within_a_tenth_and_memory_within_a_twentieth(plans: dict[str, TrainingPlan], name: str) -> None:
    found, taken = plans[name], TAKEN[name]
    steps = found.times[0].seconds
    assert steps is not None
    number = found.work["steps"]
    ratio = steps.value / (taken["seconds"] / (number - 1) * number)
    assert 0.9 < ratio < 1.1
    assert found.peak_bytes is not None
    memory = found.peak_bytes.value / taken["peak_memory_bytes"]
    assert 0.95 < memory < 1.05


def test_most_whole_stages_are_within_a_tenth(plans: dict[str, TrainingPlan]) -> None:
    """What is around the steps is of the host: it loads a model from its disk, and compiles."""
    ratios = []
    for name, found in plans.items():
        taken, number = TAKEN[name], found.work["steps"]
        steps = taken["seconds"] / (number - 1) * number
        planned = add_up(found.times)
        assert planned is not None
        ratios.append(planned.value / (steps + sum(seconds for *_, seconds in taken["others"])))
    assert sum(0.9 < ratio < 1.1 for ratio in ratios) >= len(GPU) - 2
    assert all(0.9 < ratio < 1.1 for ratio in ratios[-3:])  # other models' reading and held-out losses by their work
