"""Probing's task: the further held-out sets become examples, for the base model and the new one alike."""

from pathlib import Path

import polars as pl
from prefect import get_run_logger, task

from schemas.artifacts import DatasetRef, ModelRef, ProbesRef
from schemas.config import ProbeConfig, TokenizationConfig
from tasks import storage, tracking
from tasks.base_model import limit_length
from tasks.caching import DigestedJson, stage_cache
from tasks.ingestion.sources.sources import digest_source
from tasks.probing.examples import data_of, make_examples
from tasks.registry.sources import bring_sources
from tasks.tokenization.templates import prepare_tokenizer


def digest_probes(probes: tuple[ProbeConfig, ...]) -> tuple[str, ...]:
    """Return the digest of each probe's files, for the cache."""
    return tuple(digest_source(bring_sources(data_of(probe))) for probe in probes)


@task(
    name="probes",
    task_run_name="prepare the probes",
    cache_policy=stage_cache("probing"),
    persist_result=True,
    result_serializer=DigestedJson(),
)
def prepare_probes(
    probes: tuple[ProbeConfig, ...],
    source_digests: tuple[str, ...],
    base_model: ModelRef,
    dataset: DatasetRef,
    config: TokenizationConfig,
    *,
    chat_template: str | None,
    template_file_digest: str | None,
    seed: int,
    parent_run_id: str,
) -> ProbesRef:
    """Make the examples of each probe. The digests are there for the cache: a file may change under its name."""
    warnings: list[str] = []
    settings = {"probes": {probe.name: probe.model_dump(mode="json") for probe in probes}}
    with tracking.stage_run(parent_run_id, "probes", settings) as run_id, storage.new_folder() as folder:
        model_folder: Path = tracking.resolve(base_model)
        prepared = prepare_tokenizer(model_folder, chat_template)
        config, _ = limit_length(config, model_folder, base_model.name)
        trained: set[str] = set()
        for part in tracking.read_parts(dataset, "train.parquet"):
            trained.update(pl.read_parquet(part, columns=["example_id"])["example_id"])
        (folder / "probes").mkdir()
        for probe in probes:
            made = make_examples(probe, bring_sources(data_of(probe)), prepared, config, trained, seed=seed)
            made.examples.write_parquet(folder / "probes" / f"{probe.name}.parquet")
            warnings += made.warnings
            tracking.log_metrics(run_id, {f"probe/{probe.name}/rows": made.examples.height})
            get_run_logger().info("Probe %s: %s rows of %s", probe.name, f"{made.examples.height:,}", probe.source)
        uri, digest = tracking.publish(folder / "probes", run_id, "probes")
    return ProbesRef(
        uri=uri,
        digest=digest,
        mlflow_run_id=run_id,
        names=tuple(probe.name for probe in probes),
        warnings=tuple(warnings),
    )
