"""What a run says of itself: its name, the facts for the report page, and the JSON report."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import PurePath

from prefect.runtime import flow_run

from schemas.artifacts import (
    AdapterRef,
    ComparisonReport,
    DatasetRef,
    DatasetReport,
    EvaluationReport,
    MergedRef,
    ModelRef,
    RegistryEntry,
    RunReport,
    TokensRef,
    TokensReport,
    TrainingReport,
)
from schemas.config import RunConfig


def describe_run(config: RunConfig) -> str:
    """Return a name that a person can read: what for, model, dataset, date (UTC)."""
    source = config.data.source
    data = source.removeprefix("datasets:/") if source.startswith("datasets:/") else PurePath(source).stem
    return f"{config.name}: {PurePath(config.model.base_model).name} on {data}, {datetime.now(UTC):%Y-%m-%d %H:%M}"


def account_rows(dataset: DatasetRef, tokens: TokensRef) -> DatasetReport:
    """Return where every row went, over ingestion and tokenization."""
    rejected = Counter(dataset.rows_rejected) + Counter(tokens.rows_rejected)
    report = DatasetReport(
        digest=dataset.digest,
        rows_in=dataset.rows_in,
        rows_train=tokens.rows_train,
        rows_eval=tokens.rows_eval,
        rows_rejected=dict(rejected),
        rows_duplicate=dataset.rows_duplicate,
        rows_leaked=dataset.rows_leaked,
    )
    placed = report.rows_train + report.rows_eval + rejected.total() + report.rows_duplicate + report.rows_leaked
    assert report.rows_in == placed, f"rows vanished: {report.rows_in} came in, {placed} are accounted for"
    return report


def summarize_facts(
    config: RunConfig,
    base_model: ModelRef,
    dataset: DatasetRef,
    tokens: TokensRef,
    adapter: AdapterRef,
    merged: MergedRef,
) -> dict[str, dict[str, str]]:
    """Return sections of facts for the report page, worded for people."""
    rows = account_rows(dataset, tokens)
    return {
        "Data": {
            "Dataset": config.data.source,
            "Rows in": f"{rows.rows_in:,}",
            "Trained on": f"{rows.rows_train:,}",
            "Held out": f"{rows.rows_eval:,}",
            "Duplicates removed": f"{rows.rows_duplicate:,}",
            "Leaks removed": f"{rows.rows_leaked:,}",
            **{f"Rejected: {reason}": f"{number:,}" for reason, number in rows.rows_rejected.items()},
            "Digest": rows.digest[:12],
        },
        "Training": {
            "Base model": base_model.name + (f" @ {base_model.revision}" if base_model.revision else ""),
            "Adapter": f"LoRA rank {config.training.rank}, alpha {config.training.alpha:g}",
            "Steps": f"{adapter.num_steps:,}",
            "Trained tokens an epoch": f"{tokens.trained_tokens:,} of {tokens.total_tokens:,}",
            "Final loss": f"{adapter.final_loss:.4f}",
            "Speed": f"{adapter.tokens_per_second:,.0f} tokens/s",
        },
        "Merge": {
            "Largest logit difference": f"{merged.check.max_abs_logit_diff:.2e}",
            "Greedy agreement": f"{merged.check.greedy_agreement:.1%}",
            "Differs from the base": "yes" if merged.check.differs_from_base else "no",
        },
    }


def build_report(
    mlflow_run_id: str,
    dataset: DatasetRef,
    tokens: TokensRef,
    adapter: AdapterRef,
    merged: MergedRef,
    comparison: ComparisonReport,
    entry: RegistryEntry,
    durations_seconds: dict[str, float],
) -> RunReport:
    """Gather the references of all stages into the report."""
    return RunReport(
        status="completed",
        mlflow_run_id=mlflow_run_id,
        prefect_flow_run_id=str(flow_run.id or ""),
        dataset=account_rows(dataset, tokens),
        tokens=TokensReport(
            examples=tokens.num_examples,
            trained_tokens=tokens.trained_tokens,
            total_tokens=tokens.total_tokens,
            packs=adapter.num_packs,
            packing_efficiency=adapter.packing_efficiency,
        ),
        training=TrainingReport(
            steps=adapter.num_steps,
            final_loss=adapter.final_loss,
            tokens_per_second=adapter.tokens_per_second,
            peak_memory_bytes=adapter.peak_memory_bytes,
            warnings=adapter.warnings,
        ),
        merge=merged.check,
        evaluation=EvaluationReport(
            num_examples=comparison.num_examples,
            before=comparison.before,
            after=comparison.after,
            delta=comparison.delta,
            champion=comparison.champion,
        ),
        registry=entry,
        durations_seconds=durations_seconds,
    )
