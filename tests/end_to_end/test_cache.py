"""What did not change is not done again; what changed is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from schemas.artifacts import RunReport
from tasks import tracking
from tests.end_to_end.conftest import RunPipeline

pytestmark = pytest.mark.slow
_ROWS = [{"prompt": f"Say {n}.", "completion": f"The number {n}."} for n in range(24)]
_QUICK = {"rank": 4, "alpha": 8, "max_steps": 1, "micro_batch": 4}


def _reused(report: RunReport) -> set[str]:
    tags = tracking.get_run(report.mlflow_run_id).data.tags
    return {name.removeprefix("sft.reused.") for name in tags if name.startswith("sft.reused.")}


@pytest.fixture
def run(run_pipeline: RunPipeline, tmp_path: Path) -> Callable[..., RunReport]:
    def run(rows: list[dict[str, str]], template: str | None = None) -> RunReport:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"data": {"source": str(path)}, "training": _QUICK, "registry": {"name": "cached"}}
        if template is not None:
            (tmp_path / "t.jinja").write_text(template)
            settings["model"] = {
                "base_model": str(Path(__file__).resolve().parents[2] / "deploy" / "demo" / "base_model"),
                "chat_template": str(tmp_path / "t.jinja"),
            }
        return run_pipeline(settings)

    return run


def test_an_unchanged_run_reuses_three_stages_and_a_changed_row_none(run: Callable[..., RunReport]) -> None:
    first = run(_ROWS)
    again = run(_ROWS)
    assert _reused(first) == set()
    assert _reused(again) == {"ingest", "tokenize", "evaluate-base"}
    assert again.mlflow_run_id != first.mlflow_run_id
    assert again.evaluation.before == first.evaluation.before
    assert again.training.final_loss == first.training.final_loss
    changed = run([*_ROWS[:-1], {"prompt": "Say 23.", "completion": "The number twenty-three."}])
    assert _reused(changed) == set()


def test_a_changed_template_keeps_the_rows_only(run: Callable[..., RunReport]) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [{**row, "prompt": row["prompt"] + "!"} for row in _ROWS]
    run(rows, template)
    assert _reused(run(rows, template)) == {"ingest", "tokenize", "evaluate-base"}
    assert _reused(run(rows, template.replace("\n{{ m.content }}", "\n:{{ m.content }}"))) == {"ingest"}


def test_a_changed_line_of_a_stage_changes_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shutil

    from tasks import caching

    for folder in ("tasks", "schemas"):
        shutil.copytree(caching._ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(caching, "_ROOT", tmp_path)
    stages = ("ingestion", "tokenization", "evaluation")
    before = {stage: caching.digest_code((stage,)) for stage in stages}
    with (tmp_path / "tasks" / "ingestion" / "formats.py").open("a") as file:
        file.write("# a line\n")
    after = {stage: caching.digest_code((stage,)) for stage in stages}
    assert [stage for stage in stages if after[stage] != before[stage]] == ["ingestion"]
    with (tmp_path / "tasks" / "models.py").open("a") as file:
        file.write("# a line\n")
    assert all(caching.digest_code((stage,)) != after[stage] for stage in stages)
