"""What did not change is not done again; what changed is, and what was damaged on the disk."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import polars as pl
import pytest
from prefect import flow, task
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, PREFECT_TASKS_REFRESH_CACHE, temporary_settings

from schemas.artifacts import AdapterRef, Ref, RunReport
from tasks import tracking
from tasks.caching import DigestedJson, is_cached, stage_cache
from tests.end_to_end.conftest import BASE_MODEL, RunPipeline
from tests.laboratory.damage import cut, delete, flip, replace_with

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
    for report in (first, again):  # what was found in the cache is shown all the same
        assert [item.path for item in tracking.client().list_artifacts(report.mlflow_run_id, "quality")] == [
            "quality/quality.html"
        ]
    told = [_read_told(report) for report in (first, again)]
    assert len(told[0]) == 2
    assert told[1] == [f"{line} (cached)" for line in told[0]]
    assert again.mlflow_run_id != first.mlflow_run_id
    assert again.evaluation.before == first.evaluation.before
    assert again.training.final_loss == first.training.final_loss
    other = template.replace("\n{{ m.content }}", "\n:{{ m.content }}")
    assert _reused(run(_ROWS, other)) == {"ingest"}
    changed = run([*_ROWS[:-1], {"prompt": "Say 23.", "completion": "The number twenty-three."}], other)
    assert _reused(changed) == set()


def _read_told(report: RunReport) -> list[str]:
    """Return what the log says of examples and rows."""
    log = Path(tracking.client().download_artifacts(report.mlflow_run_id, "logs/run-1.log")).read_text("utf-8")
    return re.findall(r"(?m)\d+ (?:rows in = |examples, ).*$", log)


def _adapter(report: RunReport) -> AdapterRef:
    found = tracking.recall(report.mlflow_run_id, "train", AdapterRef)
    assert found is not None
    return found


def _find_stored(home: Path, ref: Ref) -> Path:
    return home / "artifacts" / str(ref.mlflow_run_id) / "artifacts" / ref.uri.rsplit("/", 1)[1]


def _child(report: RunReport, stage: str) -> Ref:
    """Return where a stage's folder lies, by the tags and artifacts of its run."""
    parent = tracking.get_run(report.mlflow_run_id)
    query = f"tags.`{tracking.PARENT_TAG}` = '{report.mlflow_run_id}' AND tags.`{tracking.STAGE_TAG}` = '{stage}'"
    (run,) = tracking.client().search_runs([parent.info.experiment_id], query)
    folder = {"ingest": "dataset", "tokenize": "tokens", "evaluate-base": "evaluation"}[stage]
    return Ref(uri=f"runs:/{run.info.run_id}/{folder}", digest="", mlflow_run_id=str(run.info.run_id))


def test_a_run_on_damaged_files_ends_as_the_undisturbed_one(
    run: Callable[..., RunReport], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n!{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n!{% endif %}"
    first = run(_ROWS, template)
    tables = {stage: _find_stored(home, _child(first, stage)) for stage in ("ingest", "tokenize")}
    cached = {path.read_bytes(): path for path in (home / "cache").rglob("train.parquet")}

    # Rows are cut off in the cache: the copy that was published takes the place of the damaged one.
    dataset = cached[(tables["ingest"] / "train.parquet").read_bytes()]
    pl.read_parquet(dataset).head(3).write_parquet(dataset)
    # Ids are turned around in the cache and where they were published: they are made again.
    tokens = cached[(tables["tokenize"] / "train.parquet").read_bytes()]
    for table in (tokens, tables["tokenize"] / "train.parquet"):
        pl.read_parquet(table).with_columns(pl.col("input_ids").list.reverse()).write_parquet(table)
    caplog.clear()
    again = run(_ROWS, template)
    assert _reused(again) == {"ingest", "evaluate-base"}
    assert f"{dataset.parent} is damaged" in caplog.text
    assert "Stage tokenize runs again, its result is lost" in caplog.text
    assert _adapter(again).digest == _adapter(first).digest
    assert again.training.final_loss == first.training.final_loss
    assert again.dataset == first.dataset


@task(cache_policy=stage_cache("tokenization"), persist_result=True, result_serializer=DigestedJson())
def triple(number: int, parent_run_id: str) -> int:
    """Return three times the number."""
    return 3 * number


@flow
def triple_all(numbers: list[int]) -> list[int]:
    """Return three times each number, and how many results were found."""
    states = [triple(number, "run", return_state=True) for number in numbers]
    return [*(state.result() for state in states), sum(state.name == "Cached" for state in states)]


@pytest.mark.usefixtures("run_pipeline")
def test_every_damage_of_a_kept_result_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    draw = Random(int(os.environ.get("SFT_SEED", "0")))
    folder = Path(PREFECT_LOCAL_STORAGE_PATH.value())
    before = set(folder.iterdir())
    numbers = list(range(20))
    right = [3 * number for number in numbers]
    assert triple_all(numbers) == [*right, 0]
    assert triple_all(numbers) == [*right, 20]
    assert "is damaged" not in caplog.text
    files = sorted(set(folder.iterdir()) - before)
    kept = [file for file in files if b"digested-json" in file.read_bytes()]
    assert len(kept) == 20
    content = kept[0].read_bytes()
    for file in kept[1:]:
        way = draw.choice([cut, flip, delete, replace_with(kept[0])])
        way(file, draw)
    assert triple_all(numbers)[:-1] == right
    assert kept[0].read_bytes() == content


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
