"""What did not change is not done again; what changed is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE, temporary_settings

from schemas.artifacts import RunReport
from tasks import tracking
from tasks.caching import is_cached, stage_cache
from tests.end_to_end.conftest import BASE_MODEL, RunPipeline

pytestmark = pytest.mark.slow
_ROWS = [{"prompt": f"Say {n}.", "completion": f"The number {n}."} for n in range(24)]
_QUICK = {"rank": 4, "alpha": 8, "max_steps": 1, "micro_batch": 4}


def _reused(report: RunReport) -> set[str]:
    tags = tracking.get_run(report.mlflow_run_id).data.tags
    return {name.removeprefix("sft.reused.") for name in tags if name.startswith("sft.reused.")}


@pytest.fixture
def run(run_pipeline: RunPipeline, tmp_path: Path) -> Callable[..., RunReport]:
    def run(rows: list[dict[str, str]], template: str) -> RunReport:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "t.jinja").write_text(template)
        model = {"base_model": str(BASE_MODEL), "chat_template": str(tmp_path / "t.jinja")}
        return run_pipeline(
            {"model": model, "data": {"source": str(path)}, "training": _QUICK, "registry": {"name": "cached"}}
        )

    return run


def test_an_unchanged_run_reuses_three_stages_another_template_keeps_the_rows_and_other_rows_keep_nothing(
    run: Callable[..., RunReport],
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    first = run(_ROWS, template)
    again = run(_ROWS, template)
    assert _reused(first) == set()
    assert _reused(again) == {"ingest", "tokenize", "evaluate-base"}
    assert again.mlflow_run_id != first.mlflow_run_id
    assert again.evaluation.before == first.evaluation.before
    assert again.training.final_loss == first.training.final_loss
    other = template.replace("\n{{ m.content }}", "\n:{{ m.content }}")
    assert _reused(run(_ROWS, other)) == {"ingest"}
    changed = run([*_ROWS[:-1], {"prompt": "Say 23.", "completion": "The number twenty-three."}], other)
    assert _reused(changed) == set()


@task(cache_policy=stage_cache("tokenization"), persist_result=True)
def double(number: int, parent_run_id: str) -> int:
    """Return twice the number; the second parameter is no part of the key."""
    return 2 * number


@flow
def look() -> list[bool]:
    """Look for a result before it is there and after, for another one, and where nothing cached is wanted."""
    found = [is_cached(double, number=2)]
    double(2, "run")
    found += [is_cached(double, number=2), is_cached(double, number=3)]
    with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: True}):
        found.append(is_cached(double, number=2))
    return found


@pytest.mark.usefixtures("run_pipeline")
def test_a_cached_result_is_known_before_it_is_asked_for() -> None:
    assert look() == [False, True, False, False]
