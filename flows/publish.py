"""Publish a dataset: check it, keep it in MLflow as a version, and tell whoever waits for new data."""

import json
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows.events import announce
from flows.promote import name_requester
from schemas.artifacts import Published
from schemas.config import DataConfig, ModelConfig, RunConfig
from tasks import tracking
from tasks.registry.publication import PublicationError, make_name, publish_files

if TYPE_CHECKING:
    from flows.checking import Check

EVENT = "dataset.published"


@flow(name="publish", flow_run_name="publish {dataset}")
def publish(
    dataset: str,
    base_model: str,
    name: str = "",
    columns: dict[str, str] | None = None,
    announce_again: bool = False,
    requested_by: str = "",
) -> Published:
    """Check a dataset, register it in MLflow as a version, and emit `dataset.published`.

    Args:
        dataset: File or folder on the worker's machine, or a dataset of the hub.
        base_model: Folder or hub name of the model whose tokenizer the check uses.
        name: Of the dataset; empty: from its path.
        columns: Where the data names a column otherwise: the format's field name to the data's column name.
        announce_again: Emit the event also when this content was published before.
        requested_by: Who publishes.
    """
    config = RunConfig(model=ModelConfig(base_model=base_model), data=DataConfig(source=dataset, columns=columns or {}))
    published, check = publish_now(config, name=name, who=name_requester(requested_by))
    told = tell(published, again=announce_again)
    text = f"## {describe_publication(published)}\n\n{describe_event(published, told)}\n\n"
    text += "\n".join(f"- {what}: {count:,}" for what, count in check.rows.items())
    create_markdown_artifact(text, key="dataset", description="What was published")
    get_run_logger().info("%s; %s", describe_publication(published), describe_event(published, told))
    return published


def publish_now(config: RunConfig, *, name: str, who: str) -> tuple[Published, "Check"]:
    """Check `data.source` as a run would and keep its files.

    Args:
        config: the dataset, and the tokenizer and limits for the check.
        name: of the dataset; empty: from its path.
        who: recorded.

    Raises:
        PublicationError: a budget is broken, or the dataset is an index of others.
    """
    from flows.checking import check_dataset  # not at the top: a worker imports this module to cancel a run
    from tasks.ingestion.sources.sources import find_sources

    # The held-out dataset and the mixture of a config are datasets of their own.
    data, source = config.data.model_copy(update={"eval_source": None, "mixture": ()}), config.data.source
    sources = find_sources(data.datasets[0])
    if len(sources) > 1 or sources[0].reading is not None:
        raise PublicationError(f"{source}: entries of an index say how files are read: publish the files themselves")
    check = check_dataset(data, config.model, config.tokenization, seed=config.seed)
    if check.problems:
        raise PublicationError(f"{source} is not published: {'; '.join(check.problems)}")
    files = {_place(file.name): file.path for file in sources[0].files}
    facts: dict[str, Any] = json.loads(check.to_json())
    return publish_files(name or make_name(source), files, facts, source=source, who=who), check


def _place(name: str) -> str:
    """Return a file's place inside the published folder; names of the hub carry the dataset's name."""
    return name.lstrip("/")


def tell(published: Published, *, again: bool) -> str | None:
    """Emit the event for new content; return the server that took it.

    Raises:
        AnnouncementError: the server did not take it.
    """
    if not published.is_new and not again:
        return None
    payload = {
        "uri": published.address,
        "digest": published.digest,
        "name": published.name,
        "version": published.version,
        "files": published.uri,
    }
    return announce(EVENT, f"dataset.{published.name}", payload)


def describe_publication(published: Published) -> str:
    """Say what became of the dataset."""
    if published.is_new:
        return f"{published.name} version {published.version} is published as {published.address}"
    return f"the same content is {published.address} already; no new version was made"


def describe_event(published: Published, told: str | None) -> str:
    """Say who was told."""
    if told is not None:
        return f"event {EVENT} for dataset.{published.name} sent to {told}"
    return "no event was sent: " + ("no Prefect server is configured" if published.is_new else "nothing is new")


def describe_place(published: Published) -> str:
    """Say where a person finds it in MLflow."""
    return tracking.ui_link(str(published.mlflow_run_id)) or f"MLflow run {published.mlflow_run_id}"
