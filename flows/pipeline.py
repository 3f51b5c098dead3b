"""The whole run on one page: a dataset and a base model become a registered, evaluated model."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

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
from flows.form import (
    ALL_SETTINGS,
    BASE_MODEL,
    DATASET,
    LEARNING_RATE,
    NUM_EPOCHS,
    RECIPE,
    RESUME,
    TEXT,
    put_on,
)
from flows.gpu_stages import evaluate, train
from flows.probing import digest_template, prepare_probes
from schemas.artifacts import DatasetRef, ModelRef, ProbesRef, RunReport, SourceRef, TokensRef
from schemas.config import RunConfig
from schemas.loading import ConfigError
from tasks import garbage, tracking
from tasks.caching import CACHED, run_stage
from tasks.registry.recipes import need_recipe


def _flow_run_name() -> str:
    given = flow_run.parameters
    if given["recipe"]:  # a name that needs no server: what the recipe says is looked up in the run
        return f"recipe of {given['recipe']} on {given['dataset_uri'] or 'its newest version'}"
    try:
        return describe_run(put_on(_need(given["config"]), given))
    except ConfigError:  # the run itself says what is wrong
        return "settings that go against each other"


def choose_config(config: RunConfig, recipe: str, given: Mapping[str, Any]) -> RunConfig:
    """Return the config of a run: of the form, or the recipe of a published dataset, with what stands above it.

    Raises:
        ValueError: the dataset has no recipe, or settings go against each other.
    """
    return put_on(need_recipe(recipe).config if recipe else _need(config), given)


def _need(config: Any) -> RunConfig:
    """Return the config; Prefect does not miss it where a script calls the flow without one."""
    if not isinstance(config, RunConfig):
        raise ConfigError("sft_pipeline has no config: give it one, as load_config reads it")
    return config


@flow(name="sft-pipeline", flow_run_name=_flow_run_name)
def sft_pipeline(
    config: RunConfig = ALL_SETTINGS,
    dataset_uri: Annotated[str | None, TEXT] = DATASET,
    recipe: str = RECIPE,
    resume: str = RESUME,
    base_model: Annotated[str | None, TEXT] = BASE_MODEL,
    num_epochs: Annotated[float, Field(ge=0, le=1000)] = NUM_EPOCHS,
    learning_rate: Annotated[float, Field(ge=0, le=1)] = LEARNING_RATE,
) -> RunReport:
    """Fine-tune a language model on a dataset, prove what it gained, and register it.

    Args:
        config: Every setting, a section a stage. The fields above count where they are filled in.
        dataset_uri: File, folder, address, hf://NAME or datasets:/NAME/VERSION whose rows are trained. Empty: as in the
            settings below (Dataset, Source).
        recipe: Name of a published dataset whose recipe (settings, held-out set, model name) is taken in place of all
            settings above; the first four fields still count.
        resume: auto goes on with an interrupted run of these settings; never starts anew; or an MLflow run id.
        base_model: Folder, name on the hub, or models:/NAME@alias of the model that is trained. Empty: as in the
            settings below.
        num_epochs: Passes over the training rows. 0: as in the settings below (Training).
        learning_rate: Peak of the learning rate, such as 0.0001. 0: as in the settings below (Training).
    """
    above = {"base_model": base_model, "dataset_uri": dataset_uri}
    config = choose_config(config, recipe, {**above, "num_epochs": num_epochs, "learning_rate": learning_rate})
    title = describe_run(config)
    with garbage.importing():
        from flows import stages  # not at the top: see there

    stages.check_settings(config.registry.gate, config.evaluation.probes)
    gpu_stages.prepare(config.training)
    with cancel_with_server(), open_attempt(config, resume=resume, run_name=title) as run:
        report = _run_stages(config, run, title)
    keep_outcome(report)
    return report


def _run_stages(config: RunConfig, run: str, title: str) -> RunReport:
    """Run all stages, one after the other, as parts of an MLflow run, and close its records."""
    with garbage.importing():
        from flows import stages
        from flows.preflight import check_run

    seconds: dict[str, float] = {}
    with _clock(seconds, "locate"):
        base = stages.locate_model(config.model)
        source = stages.locate_dataset(config.read_data)
        check_inputs(run, source, base)
        advice = tell_warnings(check_run(tracking.resolve(base), config))
    dataset, tokens, probes = _prepare_data(config, source, base, run, seconds)
    with _clock(seconds, "evaluate_base"):
        before = evaluate(base, tokens, config.evaluation, parent_run_id=run, probes=probes)
        expected, few = stages.foresee(before, dataset, config.evaluation, config.registry.gate)
    with _clock(seconds, "train"):
        adapter = train(base, tokens, config.training, seed=config.seed, parent_run_id=run)
    with _clock(seconds, "merge"):
        merged = stages.merge(base, adapter, tokens, dataset, config.merge, parent_run_id=run)
    with _clock(seconds, "evaluate_merged"):
        after = evaluate(merged, tokens, config.evaluation, parent_run_id=run, probes=probes)
    with _clock(seconds, "evaluate_champion"):
        champion, held = evaluate_champion(config, tokens, after, run)
    with _clock(seconds, "compare"):
        noted = name_warnings(dataset, tokens, probes)
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
            facts=summarize_facts(config, base, dataset, tokens, adapter, merged, expected),
            warnings=(*advice, *few, *describe_choice(config), *noted, *adapter.warnings, *gpu_stages.read_losses(run)),
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
            base_model=base,
            dataset=dataset,
            tokens=tokens,
            git_commit=git_commit(),
            parent_run_id=run,
        )
    report = build_report(run, dataset, tokens, adapter, merged, comparison, entry, seconds)
    tracking.finish_parent(run, report, dataset, {"ingest": dataset, "tokenize": tokens, "evaluate-base": before})
    return report


def _prepare_data(
    config: RunConfig, source: SourceRef, base: ModelRef, run: str, seconds: dict[str, float]
) -> tuple[DatasetRef, TokensRef, ProbesRef | None]:
    """Ingest and tokenize, account for every row, and make ready what else is asked of the models.

    Raises:
        BudgetError: more rows were rejected than the config allows, or all held-out ones.
    """
    from flows import stages

    with _clock(seconds, "ingest"):
        ingested = run_stage(stages.ingest, source, config.read_data, seed=config.seed, parent_run_id=run)
        dataset = ingested.result()
    with _clock(seconds, "tokenize"):
        template = config.model.chat_template
        tokenized = run_stage(
            stages.tokenize,
            dataset,
            base,
            config.tokenization,
            chat_template=template,
            template_file_digest=digest_template(template),
            parent_run_id=run,
        )
        tokens = tokenized.result()
        tell_rows(dataset, tokens, is_cached=[ingested.name == CACHED, tokenized.name == CACHED])
        stages.log_quality(dataset, tokens, base, run)
        check_rejected(config.data, dataset, tokens)
        return dataset, tokens, prepare_probes(config, base, dataset, run)


@contextmanager
def _clock(seconds: dict[str, Any], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)
