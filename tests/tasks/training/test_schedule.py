import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import TrainingConfig
from tasks.training.schedule import SCHEDULES, compute_learning_rate, count_steps


@pytest.mark.parametrize(
    ("num_rows", "epochs", "max_steps", "expected"),
    [
        (40, 3.0, None, (5, 15)),
        (41, 3.0, None, (6, 18)),  # the last step of each epoch has one row
        (40, 0.5, None, (5, 3)),
        (40, 3.0, 7, (5, 7)),
        (3, 1.0, None, (1, 1)),
        (40, 0.01, None, (5, 1)),
    ],
)
def test_step_counts(num_rows: int, epochs: float, max_steps: int | None, expected: tuple[int, int]) -> None:
    config = TrainingConfig(micro_batch=4, gradient_accumulation_steps=2, num_epochs=epochs, max_steps=max_steps)
    assert count_steps(num_rows, config) == expected


def test_cosine_by_hand() -> None:
    config = TrainingConfig(learning_rate=0.8, warmup_fraction=0.3, scheduler="cosine")
    rates = [compute_learning_rate(step, 10, config) for step in range(10)]
    # 3 steps of warm-up in quarters of the peak, then 0.4 * (1 + cos(pi k / 7)).
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([0.4 * (1 + math.cos(math.pi * k / 7)) for k in range(1, 7)])


def test_linear_and_constant_by_hand() -> None:
    linear = TrainingConfig(learning_rate=0.8, warmup_fraction=0.0, scheduler="linear")
    assert [compute_learning_rate(step, 4, linear) for step in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    constant = TrainingConfig(learning_rate=0.8, warmup_fraction=0.0, scheduler="constant")
    assert [compute_learning_rate(step, 4, constant) for step in range(4)] == [0.8] * 4


def test_a_scheduler_is_one_entry_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "steps", lambda done: 1.0 if done < 0.5 else 0.1)
    config = TrainingConfig(learning_rate=0.8, warmup_fraction=0.0).model_copy(update={"scheduler": "steps"})
    assert [compute_learning_rate(step, 4, config) for step in range(4)] == pytest.approx([0.8, 0.8, 0.08, 0.08])


def test_the_config_knows_the_schedulers_of_the_table() -> None:
    assert set(get_args(TrainingConfig.model_fields["scheduler"].annotation)) == set(SCHEDULES)


def test_an_unknown_scheduler_is_refused() -> None:
    config = TrainingConfig().model_copy(update={"scheduler": "polynomial"})
    with pytest.raises(ValueError, match="no 'polynomial'; there are cosine, linear, constant"):
        compute_learning_rate(0, 4, config)


@given(
    num_steps=st.integers(1, 500),
    warmup=st.floats(0, 1),
    scheduler=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_rate_is_never_zero_nor_above_the_peak(num_steps: int, warmup: float, scheduler: str) -> None:
    config = TrainingConfig.model_validate({"learning_rate": 0.5, "warmup_fraction": warmup, "scheduler": scheduler})
    assert all(0 < compute_learning_rate(step, num_steps, config) <= 0.5 for step in range(num_steps))
