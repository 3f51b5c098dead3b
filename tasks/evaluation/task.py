"""The door of evaluation: a model answers the held-out rows, and the evaluations of two models are compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from schemas.artifacts import (
    Champion,
    ComparisonReport,
    DatasetRef,
    EvalReport,
    ModelRef,
    ProbeReport,
    ProbesRef,
    TokensRef,
)
from schemas.config import DpoConfig, EvaluationConfig, GateConfig
from schemas.judgements import ChampionReport, Decision
from tasks import speeds, storage, tracking
from tasks.caching import DigestedJson, digest_conditions, stage_cache
from tasks.evaluation.champion import Rival, add_answers, compare_with_champion, incomparable
from tasks.evaluation.comparison import Comparison, compare, compare_nothing
from tasks.evaluation.conversations import find_conversations
from tasks.evaluation.gate import judge
from tasks.evaluation.metrics import average_rows
from tasks.evaluation.power import expect_effects
from tasks.evaluation.preferences import add_rewards, has_pairs
from tasks.evaluation.probes import PROBES_FOLDER, compare_probe, warn_of_probes
from tasks.evaluation.report import write_report
from tasks.evaluation.scoring import evaluate_sets
from tasks.evaluation.verdict import list_caveats, state_verdict
from tasks.models import choose_device, choose_dtype
from tasks.progress import log_progress

_ROWS, _QUESTIONS, _PROBES = "rows.parquet", "questions.json", PROBES_FOLDER


@task(
    name="evaluate",
    task_run_name="evaluate {model.name}",
    cache_policy=stage_cache("evaluation"),
    persist_result=True,
    result_serializer=DigestedJson(),
)
def evaluate(
    model: ModelRef, tokens: TokensRef, config: EvaluationConfig, *, probes: ProbesRef | None, parent_run_id: str
) -> EvalReport:
    """Score one model on the held-out rows and on the probes, and ask it the free questions."""
    stage = f"evaluate-{model.kind}"
    timing = speeds.Timing()
    with tracking.stage_run(parent_run_id, stage, config) as run_id, storage.new_folder() as folder:
        progress = log_progress(get_run_logger())
        model_folder = tracking.resolve(model)
        shape = speeds.describe_shape(model_folder)
        found = evaluate_sets(
            model_folder, tracking.resolve_some(tokens, "eval.parquet"), config, progress, probes=_find_files(probes)
        )
        rows, metrics = found.rows, average_rows(found.rows)
        of_probes = {name: average_rows(answered) for name, answered in found.probes.items()}
        (folder / "evaluation" / _PROBES).mkdir(parents=True)
        rows.write_parquet(folder / "evaluation" / _ROWS)
        for name, answered in found.probes.items():
            answered.write_parquet(folder / "evaluation" / _PROBES / f"{name}.parquet")
        text = json.dumps(found.answers, ensure_ascii=False, indent=1)
        (folder / "evaluation" / _QUESTIONS).write_text(text, encoding="utf-8")
        tracking.log_metrics(run_id, {f"eval/{name}": value for name, value in metrics.items()})
        for probe, values in of_probes.items():
            tracking.log_metrics(run_id, {f"probe/{probe}/{name}": value for name, value in values.items()})
        tracking.log_table(run_id, rows, "rows.json")
        uri, digest = tracking.publish(folder / "evaluation", run_id, "evaluation")
    if num_asked := rows.height + sum(answered.height for answered in found.probes.values()):
        timing.note("evaluate", num_asked, shape=shape, settings=describe_effort(config), engine=model.kind)
    if rows.is_empty():
        get_run_logger().info("%s: no row is held out to evaluate it on", model.name)
    else:
        told = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        get_run_logger().info("%s on %d held-out rows: %s", model.name, rows.height, told)
    return EvalReport(
        uri=uri,
        digest=digest,
        mlflow_run_id=run_id,
        model_digest=model.digest,
        conditions=_digest_conditions(tokens, config),
        num_examples=rows.height,
        metrics=metrics,
        probes=of_probes,
    )


def describe_effort(config: EvaluationConfig) -> str:
    """Return the settings that decide how long a row's answer takes."""
    return speeds.write_settings(
        config.model_dump(mode="json", include={"batch_size", "max_new_tokens", "num_processes"})
    )


def _find_files(probes: ProbesRef | None) -> dict[str, Path]:
    if probes is None:
        return {}
    folder = tracking.resolve(probes)
    return {name: folder / f"{name}.parquet" for name in probes.names}


def _digest_conditions(tokens: TokensRef, config: EvaluationConfig) -> str:
    """Digest what two evaluations must have in common for their rows to be compared."""
    device = choose_device()
    return digest_conditions(
        "evaluation",
        tokens=tokens.digest,
        settings=config.model_dump(mode="json", include={"max_examples", "max_new_tokens"}),
        device=f"{device.type} {choose_dtype('auto', device)}",
    )


def foresee(
    before: EvalReport, dataset: DatasetRef, config: EvaluationConfig, gate: GateConfig
) -> tuple[str, tuple[str, ...]]:
    """Say, before training, what the held-out rows can show, and warn when they are too few to promote anything."""
    rows = pl.read_parquet(tracking.resolve(before) / _ROWS)
    conversations = find_conversations(tracking.resolve_some(dataset, "eval.parquet") / "eval.parquet")
    sentence, warnings = expect_effects(rows, conversations, config, gate)
    get_run_logger().info("%s", sentence)
    for warning in warnings:
        get_run_logger().warning("%s", warning)
    return sentence, warnings


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
    gate: GateConfig,
    *,
    dataset: DatasetRef,
    champion: Champion | None = None,
    champion_evaluation: EvalReport | None = None,
    seed: int,
    title: str,
    facts: dict[str, dict[str, str]],
    warnings: tuple[str, ...],
    dpo: DpoConfig,
    train_run_id: str,
    parent_run_id: str,
) -> ComparisonReport:
    """Compare base and merged model row by row, the champion too, let the gate judge, and write the page for people."""
    if (done := tracking.recall(parent_run_id, "compare", ComparisonReport)) is not None:
        return done
    with tracking.stage_run(parent_run_id, "compare", gate) as run_id, storage.new_folder() as folder:
        folders = tracking.resolve(before), tracking.resolve(after)
        rows_before, rows_after, theirs = _read_rows(before, after, champion_evaluation, dpo)
        common: dict[str, Any] = {
            "seed": seed,
            "judged": gate.metrics,
            "conversations": find_conversations(tracking.resolve_some(dataset, "eval.parquet") / "eval.parquet"),
        }
        comparison = (
            compare_nothing(rows_before, rows_after, config)
            if rows_before.is_empty() and rows_after.is_empty()
            else compare(rows_before, rows_after, config, **common)
        )
        rival = _compare_with(champion, champion_evaluation, theirs, rows_after, config, **common) if champion else None
        against = rival.report if rival else None
        found = tuple(compare_probe(probe, *folders, config, seed=seed) for probe in config.probes)
        decision = judge(comparison.delta, gate, against, num_conversations=comparison.num_conversations, probes=found)
        warnings = tuple(dict.fromkeys((*warnings, *list_caveats(comparison), *warn_of_probes(found))))
        table = add_answers(comparison.table, rival)
        questions = _pair_questions(*folders)
        page = write_report(
            folder / "comparison",
            comparison,
            title=title,
            questions=questions,
            facts=facts,
            warnings=warnings,
            curves=tracking.training_curves(train_run_id),
            rival=rival,
            decision=decision,
            probes=found,
        )
        table.write_parquet(folder / "comparison" / "table.parquet")
        _write_questions(folder / "comparison" / _QUESTIONS, questions)
        tracking.log_table(parent_run_id, table, "side_by_side.json")
        tracking.log_folder(parent_run_id, page.parent, "report")
        _log_metrics(parent_run_id, comparison, rival, found)
        ref = _publish(folder / "comparison", run_id, comparison, decision, warnings, against, found)
        tracking.remember(run_id, ref)
    _show_tables(ref, title)
    return ref


def _publish(
    folder: Path,
    run_id: str,
    comparison: Comparison,
    decision: Decision,
    warnings: tuple[str, ...],
    champion: ChampionReport | None,
    probes: tuple[ProbeReport, ...],
) -> ComparisonReport:
    """Publish the folder of a comparison, and return a reference with what was found."""
    uri, digest = tracking.publish(folder, run_id, "comparison")
    return ComparisonReport(
        uri=uri,
        digest=digest,
        mlflow_run_id=run_id,
        num_examples=comparison.table.height,
        num_conversations=comparison.num_conversations,
        sentence=state_verdict(comparison)[1],
        decision=decision,
        warnings=warnings,
        before=comparison.before,
        after=comparison.after,
        delta=comparison.delta,
        champion=champion,
        probes=probes,
    )


def _read_rows(
    before: EvalReport, after: EvalReport, champion: EvalReport | None, dpo: DpoConfig
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame | None]:
    """Return what base, merged model and champion gave for each row; preferences are measured from the base."""
    base, tuned = (pl.read_parquet(tracking.resolve(each) / _ROWS) for each in (before, after))
    theirs = None if champion is None else pl.read_parquet(tracking.resolve(champion) / _ROWS)
    held = None if theirs is None else _with_rewards(theirs, base, dpo)
    return _with_rewards(base, base, dpo), _with_rewards(tuned, base, dpo), held


def _pair_questions(before: Path, after: Path) -> list[tuple[str, str, str]]:
    """Return each question of the config with the answers of base and merged model."""
    base, tuned = (json.loads((place / _QUESTIONS).read_text("utf-8")) for place in (before, after))
    return [(question, one, other) for (question, one), (_, other) in zip(base, tuned, strict=True)]


def _write_questions(path: Path, questions: Sequence[tuple[str, str, str]]) -> None:
    answers = [{"question": question, "base": base, "tuned": tuned} for question, base, tuned in questions]
    path.write_text(json.dumps(answers, ensure_ascii=False, indent=1), encoding="utf-8")


def _with_rewards(rows: pl.DataFrame, base: pl.DataFrame, dpo: DpoConfig) -> pl.DataFrame:
    """Return a model's rows with the metrics of preferences, where they are pairs."""
    return add_rewards(rows, base, dpo) if has_pairs(rows) else rows


def _compare_with(
    champion: Champion,
    evaluation: EvalReport | None,
    theirs: pl.DataFrame | None,
    rows: pl.DataFrame,
    config: EvaluationConfig,
    **common: Any,
) -> Rival:
    """Compare with the champion, or say why not."""
    if champion.obstacle is not None or theirs is None:
        return incomparable(champion.version, (champion.obstacle or "it was not evaluated",))
    own_run = evaluation == champion.evaluation
    notes: tuple[str, ...] = ("measured in its own run" if own_run else "measured again on these rows",)
    seen: set[str] = set()
    try:
        if champion.dataset is not None:
            seen = {name for part in tracking.read_parts(champion.dataset, "train.parquet") for name in _read_ids(part)}
    except tracking.ArtifactError as error:
        notes = (*notes, f"its training rows are gone, so that some of these may be among them ({error})")
    return compare_with_champion(champion.version, theirs, rows, seen, config, notes=notes, **common)


def _read_ids(file: Path) -> set[str]:
    return set(pl.read_parquet(file, columns=["example_id"])["example_id"])


def _log_metrics(run_id: str, comparison: Comparison, rival: Rival | None, probes: Sequence[ProbeReport]) -> None:
    """Log each metric of each model, and the differences, on the pipeline's run."""
    values = {f"before/{name}": value for name, value in comparison.before.items()}
    values |= {f"after/{name}": value for name, value in comparison.after.items()}
    values |= {f"delta/{name}": delta.value for name, delta in comparison.delta.items()}
    if rival is not None:
        values |= {f"champion/{name}": value for name, value in rival.report.metrics.items()}
        values |= {f"delta_champion/{name}": delta.value for name, delta in rival.report.delta.items()}
    for probe in probes:
        place = f"probe/{probe.name}/{probe.metric}"
        values |= {f"{place}/before": probe.before, f"{place}/after": probe.after, f"{place}/delta": probe.delta.value}
    tracking.log_metrics(run_id, values)


def _show_tables(ref: ComparisonReport, title: str) -> None:
    """Show the comparisons on the flow run's page in Prefect."""
    tables = {"before-after": ("base", ref.before, ref.delta, ref.num_examples)} if ref.num_examples else {}
    if ref.champion is not None and ref.champion.num_examples:
        beaten = ref.champion
        tables["champion"] = (f"champion v{beaten.version}", beaten.metrics, beaten.delta, beaten.num_examples)
    for key, (who, values, deltas, num_examples) in tables.items():
        create_table_artifact(
            [
                {
                    "metric": name,
                    who: round(values[name], 4),
                    "fine-tuned": round(values[name] + delta.value, 4),
                    "change": round(delta.value, 4) + 0.0,
                    "interval": delta.interval,
                }
                for name, delta in deltas.items()
            ],
            key=key,
            description=f"{title}: {who} and fine-tuned model on {num_examples} held-out rows",
        )
