"""A plan before a run and one after it: what the first counted is what the run did, what the second finds is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.planning import RunPlan, plan_run
from schemas.loading import parse_config
from tests.end_to_end.conftest import BASE_MODEL, RunPipeline

pytestmark = pytest.mark.slow


def test_the_run_does_what_was_planned_and_the_next_is_known(
    run_pipeline: RunPipeline, write_rows: Callable[..., Path]
) -> None:
    rows = [{"instruction": f"Say {n}.", "output": "word " * (n % 30 + 1) + f"{n}"} for n in range(120)]
    settings: dict[str, Any] = {
        "name": "planned",
        "model": {"base_model": str(BASE_MODEL)},
        "data": {"source": str(write_rows(rows))},
        "training": {"rank": 4, "num_epochs": 2, "packing": True, "micro_batch": 1},
        "evaluation": {"batch_size": 16, "max_new_tokens": 24, "num_resamples": 200},
        "registry": {"name": "planned"},
    }

    def plan() -> RunPlan:
        return plan_run(parse_config(settings), most=1000, rate=3600.0)

    before = plan()
    report = run_pipeline(settings)
    assert before.cached == ()
    assert before.sizes.num_steps.value == report.training.steps
    assert before.sizes.num_packs.value == report.tokens.packs
    assert before.sizes.num_examples.value == report.tokens.examples
    assert before.sizes.total_tokens.value == report.tokens.total_tokens
    assert before.sizes.trained_tokens.value == report.tokens.trained_tokens
    assert before.rows["to train"] == report.dataset.rows_train
    assert before.num_eval_examples == report.evaluation.num_examples

    after = plan()
    assert after.cached == ("ingest", "tokenize", "evaluate base")
    assert after.rows == before.rows
    assert after.sizes == before.sizes
    assert {time.stage for time in after.times if time.seconds is None} == {"start, compare, register"}
    steps = next(time.seconds for time in after.times if time.stage == "train: steps")
    assert steps is not None
    assert steps.low <= report.tokens.total_tokens * 2 / report.training.tokens_per_second <= steps.high
    assert after.memory.seen_peak_bytes == report.training.peak_memory_bytes
