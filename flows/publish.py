"""Publish a dataset: check it, keep it in MLflow as a version, and send the event that automations wait for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows.events import announce
from flows.promote import name_requester
from schemas.artifacts import DatasetRecipe, Published
from schemas.config import DatasetConfig, RunConfig
from schemas.loading import load_config, override_config, parse_config
from tasks import tracking
from tasks.allowed_roots import check_allowed
from tasks.registry.publication import PublicationError, make_name, publish_files
from tasks.registry.recipes import find_recipe, keep_recipe

if TYPE_CHECKING:
    from flows.checking import Check

EVENT = "dataset.published"


@flow(name="publish", flow_run_name="publish {dataset}")
def publish(
    dataset: str,
    base_model: str = "",
    name: str = "",
    recipe_file: str = "",
    columns: dict[str, str] | None = None,
    announce_again: bool = False,
    requested_by: str = "",
) -> Published:
    """Check a dataset, register it in MLflow as a version, and emit `dataset.published`.

    Args:
        dataset: File or folder on the worker's machine, or a dataset of the hub.
        base_model: Of a dataset without a recipe: folder or hub name of the model whose tokenizer the check uses.
        name: Of the dataset; empty: from its path.
        recipe_file: YAML config on the worker's machine, kept as the dataset's recipe: a run with it starts on each new
            version. Empty: the recipe that the name has.
        columns: Of a dataset without a recipe: the format's field name to the data's column name.
        announce_again: Emit the event also when this content was published before.
        requested_by: Who publishes.
    """
    who = name_requester(requested_by)
    if recipe_file:
        check_allowed(Path(recipe_file), "recipe_file")
    given = load_config(Path(recipe_file)) if recipe_file else None
    values = {"model": {"base_model": base_model}, "data": {"source": dataset, "columns": columns or {}}}
    settings = parse_config(values) if base_model else None
    outcome = publish_now(dataset, name=name, recipe=given, settings=settings, who=who)
    told = tell(outcome, again=announce_again)
    lines = [describe_publication(outcome.published), describe_recipe(outcome), describe_event(outcome, told)]
    text = "\n\n".join([f"## {lines[0]}", *lines[1:]]) + "\n\n"
    text += "\n".join(f"- {what}: {count:,}" for what, count in outcome.check.rows.items())
    create_markdown_artifact(text, key="dataset", description="What was published")
    get_run_logger().info("%s", "; ".join(lines))
    return outcome.published


@dataclass(frozen=True)
class Outcome:
    """What was published, what the check found, and what it will be trained with."""

    published: Published
    check: "Check"
    recipe: DatasetRecipe | None
    """None: no run starts on it."""


def publish_now(
    source: str,
    *,
    name: str,
    recipe: RunConfig | None,
    settings: RunConfig | None,
    who: str,
    settings_chosen: bool = False,
) -> Outcome:
    """Check a dataset with the settings of the run that it will start, and keep its files and its recipe.

    Args:
        source: the dataset.
        name: of the dataset; empty: from its path.
        recipe: to be kept as the recipe of this name; None for the one that it has.
        settings: for the check of a dataset without a recipe.
        who: recorded.
        settings_chosen: somebody asked for these settings, and they are no default.

    Raises:
        PublicationError: a budget is broken, the dataset is an index of others, or there is neither a recipe nor
            settings.
    """
    from flows.checking import check_dataset  # not at the top: a worker imports this module to cancel a run

    name = name or make_name(source)
    known = find_recipe(name) if recipe is None else None
    if known is not None and settings_chosen:
        raise PublicationError(
            f"dataset {name} has a recipe, and is checked with it: leave --config and --set out, or change the recipe "
            "with --recipe my.yaml"
        )
    config = recipe or (known.config if known else None)
    if config is not None:
        config = _with_source(config, source)
        data = config.read_data
    elif settings is not None:
        config = settings
        # The held-out dataset and the mixture of such a config are datasets of their own.
        data = config.read_data.model_copy(update={"eval_source": None, "mixture": ()})
    else:
        raise PublicationError(
            f"dataset {name} has no recipe, so that nothing says how to check it: give a recipe, or a base model whose "
            "tokenizer is used"
        )
    files = _list_files(data.datasets[0])
    check = check_dataset(data, config.model, config.tokenization, seed=config.seed)
    if check.problems:
        raise PublicationError(f"{source} is not published: {'; '.join(check.problems)}")
    facts: dict[str, Any] = json.loads(check.to_json())
    published = publish_files(name, files, facts, source=source, who=who)
    if recipe is not None:
        known = keep_recipe(name, _publish_held_out(config, name, who=who), who=who)
    return Outcome(published, check, known)


def _with_source(config: RunConfig, source: str) -> RunConfig:
    return override_config(config.model_dump(mode="json", exclude_unset=True), (f"data.source={json.dumps(source)}",))


def _list_files(data: DatasetConfig) -> dict[str, Path]:
    """Return the files of a dataset by their places in the published folder."""
    from tasks.ingestion.sources.sources import find_sources

    sources = find_sources(data)
    if len(sources) > 1 or sources[0].reading is not None:
        raise PublicationError(
            f"{data.source}: entries of an index say how files are read: publish the files themselves"
        )
    if any(file.remote is not None for file in sources[0].files):
        raise PublicationError(
            f"{data.source}: files at an address are not copied: name it as data.source, or download them first"
        )
    return {_place(file.name): file.path for file in sources[0].files}


def _publish_held_out(config: RunConfig, name: str, *, who: str) -> RunConfig:
    """Keep held-out files of this machine beside the dataset, so that every worker has them."""
    data = config.read_data.held_out_dataset
    if data is None or not Path(data.source).expanduser().exists():
        return config
    files = _list_files(data)
    held_out = publish_files(f"{name}-held-out", files, {}, source=data.source, who=who)
    values = config.model_dump(mode="json", exclude_unset=True)
    return override_config(values, (f"data.eval_source={held_out.address}",))


def _place(name: str) -> str:
    """Return a file's place inside the published folder; names of the hub carry the dataset's name."""
    return name.lstrip("/")


def tell(outcome: Outcome, *, again: bool) -> str | None:
    """Emit the event for new content; return the server that took it.

    The label `sft.recipe` says whether a run is to start on it: the deployment waits for yes.

    Raises:
        AnnouncementError: the server did not take it.
    """
    published = outcome.published
    if not published.is_new and not again:
        return None
    payload = {
        "uri": published.address,
        "digest": published.digest,
        "name": published.name,
        "version": published.version,
        "files": published.uri,
    }
    return announce(EVENT, f"dataset.{published.name}", payload, labels_of(outcome))


def labels_of(outcome: Outcome) -> dict[str, str]:
    """Return what automations can match besides the dataset: a run starts where there is a recipe."""
    return {"sft.recipe": "yes" if outcome.recipe else "no"}


def describe_publication(published: Published) -> str:
    """Say what became of the dataset."""
    if published.is_new:
        return f"{published.name} version {published.version} is published as {published.address}"
    return f"the same content is {published.address} already; no new version was made"


def describe_recipe(outcome: Outcome) -> str:
    """Say what the dataset is trained with."""
    name, recipe = outcome.published.name, outcome.recipe
    if recipe is None:
        return f"{name} has no recipe, so that no run starts on it: give it one with --recipe my.yaml"
    config = recipe.config
    held_out = config.data.eval_source or f"a part of {config.data.eval_fraction:g}"
    return (
        f"recipe {recipe.number} of {name}: {config.model.base_model}, held out {held_out}, registered as "
        f"{config.registry.name}"
    )


def describe_event(outcome: Outcome, told: str | None) -> str:
    """Say who was told."""
    published = outcome.published
    if told is not None:
        what = "a run starts on it" if outcome.recipe else "no run starts on it"
        return f"event {EVENT} for dataset.{published.name} sent to {told}: {what}"
    return "no event was sent: " + ("no Prefect server is configured" if published.is_new else "nothing is new")


def describe_place(published: Published) -> str:
    """Say where a person finds it in MLflow."""
    return tracking.ui_link(str(published.mlflow_run_id)) or f"MLflow run {published.mlflow_run_id}"
