"""The door of evaluation: a model meets the held-out rows; two such meetings are compared."""

import json

import polars as pl
from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from schemas.artifacts import ComparisonReport, EvalReport, ModelRef, TokensRef
from schemas.config import EvaluationConfig
from tasks import storage, tracking
from tasks.caching import stage_cache
from tasks.evaluation.comparison import compare
from tasks.evaluation.report import write_report
from tasks.evaluation.scoring import evaluate_model

_ROWS, _QUESTIONS = "rows.parquet", "questions.json"


@task(
    name="evaluate",
    task_run_name="evaluate {model.name}",
    cache_policy=stage_cache("evaluation"),
    persist_result=True,
    result_serializer="json",
)
def evaluate(model: ModelRef, tokens: TokensRef, config: EvaluationConfig, *, parent_run_id: str) -> EvalReport:
    """Score one model on the held-out rows and ask it the free questions."""
    stage = f"evaluate-{model.kind}"
    with tracking.stage_run(parent_run_id, stage) as run_id, storage.new_folder() as folder:
        rows, metrics, answers = evaluate_model(tracking.resolve(model), tracking.resolve(tokens), config)
        (folder / "evaluation").mkdir()
        rows.write_parquet(folder / "evaluation" / _ROWS)
        text = json.dumps(answers, ensure_ascii=False, indent=1)
        (folder / "evaluation" / _QUESTIONS).write_text(text, encoding="utf-8")
        tracking.log_metrics(run_id, {f"eval/{name}": value for name, value in metrics.items()})
        tracking.log_table(run_id, rows, "rows.json")
        uri, digest = tracking.publish(folder / "evaluation", run_id, "evaluation")
    get_run_logger().info(
        "%s on %d held-out rows: %s",
        model.name,
        rows.height,
        ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()),
    )
    return EvalReport(
        uri=uri,
        digest=digest,
        mlflow_run_id=run_id,
        model_digest=model.digest,
        num_examples=rows.height,
        metrics=metrics,
    )


@task(
    name="compare",
    task_run_name="compare base and merged",
    cache_policy=NO_CACHE,
    persist_result=True,
    result_serializer="json",
)
def compare_models(
    before: EvalReport,
    after: EvalReport,
    config: EvaluationConfig,
    *,
    seed: int,
    title: str,
    facts: dict[str, dict[str, str]],
    warnings: tuple[str, ...],
    train_run_id: str,
    parent_run_id: str,
) -> ComparisonReport:
    """Compare base and merged model row by row, and write the page that a person reads."""
    if (done := tracking.recall(parent_run_id, "compare", ComparisonReport)) is not None:
        return done
    with tracking.stage_run(parent_run_id, "compare") as run_id, storage.new_folder() as folder:
        folders = tracking.resolve(before), tracking.resolve(after)
        rows_before, rows_after = (pl.read_parquet(place / _ROWS) for place in folders)
        comparison = compare(rows_before, rows_after, config, seed=seed)
        base_answers, tuned_answers = (json.loads((place / _QUESTIONS).read_text("utf-8")) for place in folders)
        questions = [(q, base, tuned) for (q, base), (_, tuned) in zip(base_answers, tuned_answers, strict=True)]
        answers = [{"question": q, "base": base, "tuned": tuned} for q, base, tuned in questions]
        page = write_report(
            folder / "comparison",
            comparison,
            title=title,
            questions=questions,
            facts=facts,
            warnings=list(warnings),
            curves=tracking.training_curves(train_run_id),
        )
        comparison.table.write_parquet(folder / "comparison" / "table.parquet")
        text = json.dumps(answers, ensure_ascii=False, indent=1)
        (folder / "comparison" / _QUESTIONS).write_text(text, encoding="utf-8")
        tracking.log_table(parent_run_id, comparison.table, "side_by_side.json")
        tracking.log_folder(parent_run_id, page.parent, "report")
        for name, values in (("before", comparison.before), ("after", comparison.after)):
            tracking.log_metrics(parent_run_id, {f"{name}/{metric}": value for metric, value in values.items()})
        tracking.log_metrics(parent_run_id, {f"delta/{name}": delta.value for name, delta in comparison.delta.items()})
        uri, digest = tracking.publish(folder / "comparison", run_id, "comparison")
        ref = ComparisonReport(
            uri=uri,
            digest=digest,
            mlflow_run_id=run_id,
            num_examples=comparison.table.height,
            before=comparison.before,
            after=comparison.after,
            delta=comparison.delta,
        )
        tracking.remember(run_id, ref)
    create_table_artifact(
        [
            {
                "metric": name,
                "base": round(ref.before[name], 4),
                "fine-tuned": round(ref.after[name], 4),
                "change": round(delta.value, 4),
                "interval": f"{delta.ci_low:.4g} to {delta.ci_high:.4g}",
            }
            for name, delta in ref.delta.items()
        ],
        key="before-after",
        description=f"{title}: base and fine-tuned model on {ref.num_examples} held-out rows",
    )
    return ref
