"""What a run says of itself: its name, the facts for the report page, and the JSON report."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import PurePath

from prefect import get_run_logger
from prefect.runtime import flow_run

from flows.rejected import judge_rejected
from schemas.artifacts import (
    AdapterRef,
    ComparisonReport,
    DatasetRef,
    DatasetReport,
    EvaluationReport,
    MergedRef,
    ModelRef,
    ProbesRef,
    RegistryEntry,
    RunReport,
    TokensRef,
    TokensReport,
    TrainingReport,
)
from schemas.config import DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from schemas.plurals import count_of
from tasks import tracking
from tasks.ingestion.reject_groups import group_rejects

WARNINGS_SHOWN = 10
"""Of a stage; quality.json and masks.json have all."""


class BudgetError(ValueError):
    """More rows are rejected than the config allows; the message says how many, why, and the way out."""


def describe_run(config: RunConfig) -> str:
    """Return a name that a person can read: what for, model, dataset, date (UTC)."""
    source = config.data.source
    place, _, entries = source.partition("#")  # of an index of LLaMA-Factory's
    data = source.removeprefix("datasets:/") if source.startswith("datasets:/") else entries or PurePath(place).stem
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
        warnings=name_warnings(dataset, tokens),
    )
    placed = report.rows_train + report.rows_eval + rejected.total() + report.rows_duplicate + report.rows_leaked
    assert report.rows_in == placed, f"rows vanished: {report.rows_in} came in, {placed} are accounted for"
    return report


def name_warnings(dataset: DatasetRef, tokens: TokensRef, probes: ProbesRef | None = None) -> tuple[str, ...]:
    """Return the first warnings of both stages, how many more there are, and those of the probes."""
    named: list[str] = []
    for stage, warnings in (("ingestion", dataset.warnings), ("tokenization", tokens.warnings)):
        named += warnings[:WARNINGS_SHOWN]
        if len(warnings) > WARNINGS_SHOWN:
            more = count_of(len(warnings) - WARNINGS_SHOWN, "further warning")
            named.append(f"{more} of {stage}: see its quality report")
    return (*named, *(probes.warnings if probes else ()))


def describe_rows(dataset: DatasetRef, tokens: TokensRef) -> str:
    """Return one line that says where every row went: rows in = the sum of the parts."""
    rows = account_rows(dataset, tokens)
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in Counter(rows.rows_rejected).most_common())
    return (
        f"{count_of(rows.rows_in, 'row')} in = {rows.rows_train:,} trained + {rows.rows_eval:,} evaluated + "
        f"{sum(rows.rows_rejected.values()):,} rejected{f' ({reasons})' if reasons else ''} + "
        f"{count_of(rows.rows_duplicate, 'duplicate')} + {rows.rows_leaked:,} leaked"
    )


def describe_tokens(tokens: TokensRef) -> str:
    """Return one line on the examples and their tokens."""
    share = tokens.trained_tokens / max(1, tokens.total_tokens)
    examples, all_tokens = count_of(tokens.num_examples, "example"), count_of(tokens.total_tokens, "token")
    return f"{examples}, {all_tokens}, {100 * share:.0f} % of them trained"


def tell_rows(dataset: DatasetRef, tokens: TokensRef, *, is_cached: Sequence[bool]) -> None:
    """Log where every row went, over both stages, and their warnings; `is_cached` of ingestion and tokenization.

    A stage that is found in the cache logs nothing by itself: its lines are the same here.
    """
    logger = get_run_logger()
    if is_cached[1]:
        logger.info("%s (cached)", describe_tokens(tokens))
    logger.info("%s%s", describe_rows(dataset, tokens), " (cached)" if all(is_cached) else "")
    tell_warnings(name_warnings(dataset, tokens))


def tell_warnings(warnings: Sequence[str]) -> Sequence[str]:
    """Log warnings, and return them."""
    logger = get_run_logger()
    for warning in warnings:
        logger.warning("%s", warning)
    return warnings


def check_rejected(config: DataConfig, dataset: DatasetRef, tokens: TokensRef) -> None:
    """Judge the rows rejected by ingestion and tokenization together by the one budget.

    Raises:
        BudgetError: more than data.max_rejected_fraction, or all held-out ones.
    """
    if config.holds_out and not tokens.num_eval_examples:
        raise BudgetError(
            f"{config.source}: none of the {dataset.rows_eval:,} held-out rows became an example "
            f"({', '.join(f'{reason} {number:,}' for reason, number in tokens.rows_rejected.items())}): mend them, or "
            "hold out others (data.eval_source, data.eval_fraction; 0 trains without any)"
        )
    rejected = Counter(dataset.rows_rejected) + Counter(tokens.rows_rejected)
    num_rows = max(dataset.rows_in, dataset.rows_read)
    if judge_rejected(rejected, num_rows, config.max_rejected_fraction, ()) is None:
        return
    tables = [tracking.resolve_some(ref) / "rejects.parquet" for ref in (dataset, tokens)]
    problem = judge_rejected(rejected, num_rows, config.max_rejected_fraction, group_rejects(tables))
    raise BudgetError(f"{config.source}: {problem}")


def summarize_facts(
    config: RunConfig,
    base_model: ModelRef,
    dataset: DatasetRef,
    tokens: TokensRef,
    adapter: AdapterRef,
    merged: MergedRef,
    expected: str,
) -> dict[str, dict[str, str]]:
    """Return sections of facts for the report page; `expected` says what the held-out rows can show."""
    rows = account_rows(dataset, tokens)
    return {
        "Data": {
            "Dataset": config.data.source,
            "Rows in": f"{rows.rows_in:,}",
            "Trained on": f"{rows.rows_train:,}",
            "Held out": f"{rows.rows_eval:,}",
            "What these can show": expected,
            "Duplicates removed": f"{rows.rows_duplicate:,}",
            "Leaks removed": f"{rows.rows_leaked:,}",
            **{f"Rejected: {reason}": f"{number:,}" for reason, number in rows.rows_rejected.items()},
            "Digest": rows.digest[:12],
        },
        "Training": {
            "Base model": base_model.name + (f" @ {base_model.revision}" if base_model.revision else ""),
            "Method": _describe_method(config.training) if adapter.sweep is None else f"LoRA, {adapter.sweep.winner}",
            **_describe_objective(config.training),
            **_describe_adapted(adapter),
            "Steps": f"{adapter.num_steps:,}",
            "Trained tokens an epoch": f"{tokens.trained_tokens:,} of {tokens.total_tokens:,}",
            "Final loss": f"{adapter.final_loss:.4f}",
            **_describe_sweep(adapter),
            "Speed": f"{adapter.tokens_per_second:,.0f} tokens/s",
        },
        "Merge": {
            "Largest logit difference": f"{merged.check.max_abs_logit_diff:.2e}",
            "Greedy agreement": f"{merged.check.greedy_agreement:.1%}",
            "Differs from the base": "yes" if merged.check.differs_from_base else "no",
        },
    }


def _describe_method(config: TrainingConfig) -> str:
    """Say what was trained, in a few words."""
    if config.is_lora:
        return f"LoRA rank {config.rank}, alpha {config.alpha:g}"
    if config.method == "full":
        return "all weights of the text decoder"
    number = config.trained_layers
    layers = "" if not number else "the last layer" if number == 1 else f"the last {number} layers"
    return "the model's own weights: " + " and ".join(filter(None, (layers, ", ".join(config.trained_modules))))


def correct_for_choice(config: EvaluationConfig, num_candidates: int) -> EvaluationConfig:
    """Return the evaluation's settings with a level at which the best of so many candidates may be judged (Bonferroni).

    The rows that chose the candidate judge it as well. Each interval and test is made so strict that all candidates'
    together would have the level that was asked for.
    """
    if num_candidates == 1:
        return config
    level = 1 - (1 - config.confidence) / num_candidates
    resamples = min(100_000, config.num_resamples * num_candidates)
    return config.model_copy(update={"confidence": level, "num_resamples": resamples})


def describe_choice(config: RunConfig) -> tuple[str, ...]:
    """Say how the comparison was made stricter for a choice among candidates."""
    number = config.training.sweep.num_candidates
    if number == 1:
        return ()
    level = correct_for_choice(config.evaluation, number).confidence
    return (
        f"The fine-tuned model was chosen of {number} candidates by these held-out rows: intervals and tests are at "
        f"{level:.2%} in place of {config.evaluation.confidence:.0%}",
    )


def _describe_objective(config: TrainingConfig) -> dict[str, str]:
    """Say what was optimized, where it is not the answers' likelihood."""
    if not config.is_paired:
        return {}
    smoothing = f", label smoothing {config.dpo.label_smoothing:g}" if config.dpo.label_smoothing else ""
    return {"Objective": f"preferences (DPO), loss {config.dpo.loss}, beta {config.dpo.beta:g}{smoothing}"}


def _describe_sweep(adapter: AdapterRef) -> dict[str, str]:
    """Return what became of each candidate of a sweep."""
    if adapter.sweep is None:
        return {}
    told = {
        f"Candidate {each.name}": f"held-out loss {each.loss:.4f}"
        if each.loss is not None
        else f"given up: {each.failure}"
        for each in adapter.sweep.candidates
    }
    return {"Chosen": adapter.sweep.sentence, **told}


def _describe_adapted(adapter: AdapterRef) -> dict[str, str]:
    """Return for each kind of weights how much of it the adapter stands beside, or is trained itself."""
    word = "Adapted" if adapter.method == "lora" else "Trained"
    return {
        f"{word}: {row.kind}": f"{row.num_adapted:,} of {row.num_weights:,} weights "
        f"({row.num_adapted_values / max(row.num_values, 1):.1%} of {row.num_values:,} values)"
        for row in adapter.adapted
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
            adapted=adapter.adapted,
            warnings=adapter.warnings,
            sweep=adapter.sweep,
        ),
        merge=merged.check,
        evaluation=EvaluationReport(
            num_examples=comparison.num_examples,
            num_conversations=comparison.num_conversations,
            sentence=comparison.sentence,
            before=comparison.before,
            after=comparison.after,
            delta=comparison.delta,
            champion=comparison.champion,
            probes=comparison.probes,
            checks=comparison.decision.checks,
            warnings=comparison.warnings,
        ),
        registry=entry,
        durations_seconds=durations_seconds,
    )
