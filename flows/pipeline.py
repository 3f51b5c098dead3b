"""The whole run on one page: a dataset and a base model become a registered, evaluated model."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows import gpu_stages
from flows.accounting import (
    build_report,
    check_rejected,
    correct_for_choice,
    describe_choice,
    describe_run,
    name_warnings,
    summarize_facts,
    tell_rows,
    tell_warnings,
)
from flows.attempts import check_inputs, git_commit, open_attempt
from flows.cancellation import cancel_with_server
from flows.champion import evaluate_champion
from flows.ending import keep_outcome
from flows.gpu_stages import evaluate, train
from flows.probing import digest_template, prepare_probes
from schemas.artifacts import RunReport
from schemas.config import RunConfig
from schemas.loading import override_config, quote_text
from tasks import garbage, tracking
from tasks.caching import CACHED, run_stage
from tasks.registry.recipes import need_recipe


def _flow_run_name() -> str:
    given = flow_run.parameters
    if given["recipe"]:  # a name that needs no server: what the recipe says is looked up in the run
        return f"recipe of {given['recipe']} on {given['dataset_uri'] or 'its newest version'}"
    return describe_run(_with_dataset(given["config"], given["dataset_uri"]))


def choose_config(config: RunConfig, recipe: str, uri: str | None) -> RunConfig:
    """Return the config of a run: of the form, or the recipe of a published dataset, on the dataset that is named.

    Raises:
        ValueError: the dataset has no recipe.
    """
    return _with_dataset(need_recipe(recipe).config if recipe else config, uri)


def _with_dataset(config: RunConfig, uri: str | None) -> RunConfig:
    return (
        config if uri is None else override_config(config.model_dump(mode="json"), (f"data.source={quote_text(uri)}",))
    )


@flow(name="sft-pipeline", flow_run_name=_flow_run_name)
def sft_pipeline(
    config: RunConfig, dataset_uri: str | None = None, recipe: str = "", resume: str = "auto"
) -> RunReport:
    """Fine-tune a language model on a dataset, prove what it gained, and register it.

    Args:
        config: Every setting, grouped by stage.
        dataset_uri: A dataset to take in place of the one above, as the event of a newly published dataset carries it.
        recipe: Name of a published dataset whose recipe (settings, held-out set, model name) is taken in place of the
            settings above.
        resume: auto goes on with an interrupted run of this config, never starts anew, or an MLflow run id.
    """
    config = choose_config(config, recipe, dataset_uri)
    seconds: dict[str, float] = {}
    title = describe_run(config)
    with garbage.importing():
        from flows import stages  # not at the top: see there
        from flows.preflight import check_model

    stages.check_settings(config.registry.gate, config.evaluation.probes)
    gpu_stages.prepare()
    with cancel_with_server(), open_attempt(config, resume=resume, run_name=title) as run:
        with _clock(seconds, "locate"):
            base_model = stages.locate_model(config.model)
            source = stages.locate_dataset(config.read_data)
            check_inputs(run, source, base_model)
            advice = tell_warnings(check_model(tracking.resolve(base_model), config.training))
        with _clock(seconds, "ingest"):
            ingested = run_stage(stages.ingest, source, config.read_data, seed=config.seed, parent_run_id=run)
            dataset = ingested.result()
        with _clock(seconds, "tokenize"):
            template = config.model.chat_template
            tokenized = run_stage(
                stages.tokenize,
                dataset,
                base_model,
                config.tokenization,
                chat_template=template,
                template_file_digest=digest_template(template),
                parent_run_id=run,
            )
            tokens = tokenized.result()
            tell_rows(dataset, tokens, is_cached=[ingested.name == CACHED, tokenized.name == CACHED])
            stages.log_quality(dataset, tokens, base_model, run)
            check_rejected(config.data, dataset, tokens)
            probes = prepare_probes(config, base_model, dataset, run)
        with _clock(seconds, "evaluate_base"):
            before = evaluate(base_model, tokens, config.evaluation, parent_run_id=run, probes=probes)
            expected, few = stages.foresee(before, dataset, config.evaluation, config.registry.gate)
        with _clock(seconds, "train"):
            adapter = train(base_model, tokens, config.training, seed=config.seed, parent_run_id=run)
        with _clock(seconds, "merge"):
            merged = stages.merge(base_model, adapter, tokens, dataset, config.merge, parent_run_id=run)
        with _clock(seconds, "evaluate_merged"):
            after = evaluate(merged, tokens, config.evaluation, parent_run_id=run, probes=probes)
        with _clock(seconds, "evaluate_champion"):
            champion, held = evaluate_champion(config, tokens, after, run)
        with _clock(seconds, "compare"):
            comparison = stages.compare_models(
                before,
                after,
                correct_for_choice(config.evaluation, config.training.sweep.num_candidates),
                config.registry.gate,
                dataset=dataset,
                champion=champion,
                champion_evaluation=held,
                seed=config.seed,
                title=title,
                facts=summarize_facts(config, base_model, dataset, tokens, adapter, merged, expected),
                warnings=(
                    *advice,
                    *few,
                    *describe_choice(config),
                    *name_warnings(dataset, tokens, probes),
                    *adapter.warnings,
                ),
                dpo=config.training.dpo,
                train_run_id=str(adapter.mlflow_run_id),
                parent_run_id=run,
            )
        with _clock(seconds, "register"):
            entry = stages.register(
                merged,
                comparison,
                config.registry,
                title=title,
                evaluation=after,
                base_model=base_model,
                dataset=dataset,
                tokens=tokens,
                git_commit=git_commit(),
                parent_run_id=run,
            )
        report = build_report(run, dataset, tokens, adapter, merged, comparison, entry, seconds)
        tracking.finish_parent(run, report, dataset, {"ingest": dataset, "tokenize": tokens, "evaluate-base": before})
    keep_outcome(report)
    return report


@contextmanager
def _clock(seconds: dict[str, Any], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)
