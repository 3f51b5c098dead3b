"""Costs that a simulator knows are found again from the trainings it makes, and the bar says how well."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.config import TrainingConfig
from tasks.planning.costs import Seen, list_terms, predict_steps
from tasks.planning.work import ExampleLengths, foresee_layout, foresee_work, read_examples
from tests.tasks.planning.test_sizes import write_split

COSTS = np.array([0.02, 2e-9, 1.5e-3, 2e-11, 3e-8, 1.5e-11, 5e-11, 1.0])
"""Of a machine: other ones than the usual."""
MODEL = {"layers": 4.0, "hidden": 256.0, "vocabulary": 2048.0, "head_flop": 4.0 * 2048 * 256}
SETTINGS: list[dict[str, Any]] = [
    {"rank": 64},
    {"rank": 8, "num_epochs": 1},
    {"rank": 16, "micro_batch": 4},
    {"rank": 64, "packing": True, "tokens_per_pack": 2048, "micro_batch": 1},
    {"rank": 32, "micro_batch": 2, "gradient_accumulation_steps": 4},
    {"rank": 64, "gradient_checkpointing": True},
    {"rank": 8, "micro_batch": 32, "num_epochs": 2},
    # The three that the fit does not see.
    {"rank": 32, "num_epochs": 2},
    {"rank": 16, "micro_batch": 8},
    {"rank": 64, "packing": True, "tokens_per_pack": 1024, "micro_batch": 2, "gradient_checkpointing": True},
]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 600).astype(int).clip(8, 900).tolist()
    return write_split(tmp_path_factory.mktemp("costs") / "train.parquet", lengths)


def make_work(split: Path, settings: dict[str, Any]) -> dict[str, float]:
    config = TrainingConfig.model_validate(settings)
    examples = read_examples(split, config)
    layout = foresee_layout(examples, config, is_gpu=False)
    trained = 11_000.0 * config.rank
    sizes = {**MODEL, "flop": 1.2e7, "trained": trained, "adapter_flop": 6 * trained}
    return {**foresee_work(examples, config, layout, seed=0), **sizes}


@pytest.fixture(scope="module")
def works(split: Path) -> list[dict[str, float]]:
    return [make_work(split, settings) for settings in SETTINGS]


def take(work: dict[str, float], noise: float = 1.0, costs: Any = COSTS) -> float:
    return float(list_terms(work) @ costs) * noise


def test_three_unseen_trainings_are_within_a_tenth(works: list[dict[str, float]]) -> None:
    generator = np.random.default_rng(1)
    misses = []
    for _ in range(20):
        costs = COSTS * generator.lognormal(0, 0.5, len(COSTS))
        seen = [Seen(work, take(work, generator.normal(1, 0.02), costs), 0.04) for work in works[:7]]
        for work in works[7:]:
            found = predict_steps(seen, work, device="cpu", noise=0.04)
            assert found is not None
            misses.append(abs(found.value / take(work, costs=costs) - 1))
    assert np.quantile(misses, 0.95) < 0.1
    assert max(misses) < 0.15


def test_one_training_says_its_own_time_and_little_of_another(works: list[dict[str, float]]) -> None:
    seen = [Seen(works[0], take(works[0]), 0.04)]
    same, other = (predict_steps(seen, work, device="cpu", noise=0.04) for work in (works[0], works[2]))
    assert same is not None
    assert other is not None
    assert same.value == pytest.approx(take(works[0]), rel=0.01)
    assert same.high < 1.25 * same.value
    assert other.high / other.value > same.high / same.value + 0.1
    twice = {**works[0], **{name: 2 * works[0][name] for name in ("steps", "passes", "tokens", "head_rows", "squares")}}
    longer = predict_steps(seen, twice, device="cpu", noise=0.04)
    assert longer is not None
    assert longer.value == pytest.approx(2 * same.value)


def test_the_bar_holds_nineteen_of_twenty(works: list[dict[str, float]]) -> None:
    generator, hits, draws = np.random.default_rng(2), 0, 400
    for _ in range(draws):
        costs = COSTS * generator.lognormal(0, 0.5, len(COSTS))
        chosen = generator.permutation(len(works))
        seen = [Seen(works[n], take(works[n], generator.normal(1, 0.04), costs), 0.04) for n in chosen[:4]]
        found = predict_steps(seen, works[chosen[4]], device="cpu", noise=0.04)
        assert found is not None
        hits += found.low <= take(works[chosen[4]], generator.normal(1, 0.04), costs) <= found.high
    assert hits / draws >= 0.9


def test_a_machine_that_is_not_steady_widens_the_bar(works: list[dict[str, float]]) -> None:
    def width(spread: float) -> float:
        seen = [Seen(works[0], take(works[0], 1 + spread * sign), 0.04) for sign in (-1, 1, -1, 1, -1, 1)]
        found = predict_steps(seen, works[0], device="cpu", noise=0.04)
        assert found is not None
        return found.high / found.value

    assert width(0.3) > width(0.01) + 0.2


def test_nothing_seen_is_nothing_said(works: list[dict[str, float]]) -> None:
    assert predict_steps([], works[0], device="cpu", noise=0.04) is None


def test_a_part_of_the_conversations_stands_for_all(split: Path) -> None:
    config = TrainingConfig(micro_batch=4)
    whole, part = read_examples(split, config), read_examples(split, config, share=0.5)
    assert isinstance(whole, ExampleLengths)
    assert len(part.rows) == 2 * len(whole.rows)


def test_ranks_that_share_a_pass_each_do_its_layers_for_a_part_of_its_tokens(split: Path) -> None:
    alone, both = (
        list_terms(make_work(split, {"rank": 8, "micro_batch": 1, "gradient_accumulation_steps": 4, **more}))
        for more in ({}, {"num_processes": 2, "context_parallel": 2})
    )
    assert both[2] == alone[2]  # each rank goes through every layer
    assert both[3:] == pytest.approx(alone[3:] / 2)
