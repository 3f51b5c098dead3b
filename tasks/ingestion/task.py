"""Ingestion's task: finds the base model, and turns the dataset's files into validated tables."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task, unmapped
from prefect.artifacts import create_table_artifact
from prefect.context import FlowRunContext
from prefect.task_runners import ThreadPoolTaskRunner

from schemas.artifacts import DatasetRef, ModelRef, Ref, SourceRef
from schemas.config import DataConfig, ModelConfig
from tasks import execution, speeds, storage, tracking
from tasks.caching import DigestedJson, digest_conditions, keep_at_once, resolve_or_repeat, stage_cache
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError
from tasks.ingestion.shard_runner import finish_shard, is_small, read_all
from tasks.ingestion.shards import SHARD_BYTES, Shard, name_sources, plan_shards
from tasks.ingestion.sources.sources import check_unchanged, digest_source
from tasks.ingestion.splitting.order import Store
from tasks.parcels import Parcel
from tasks.progress import log_progress
from tasks.registry.bases import find_base_model
from tasks.registry.sources import bring_sources, pin_sources
from tasks.stored_files import remove_files, try_store


@task(name="locate-model", task_run_name="locate {config.base_model}", persist_result=False)
def locate_model(config: ModelConfig) -> ModelRef:
    """Find or fetch the base model and digest it."""
    ref = find_base_model(config)
    get_run_logger().info("Base model %s, digest %s", ref.name, ref.digest[:12])
    return ref


@task(name="locate-dataset", task_run_name="locate {config.source}", persist_result=False)
def locate_dataset(config: DataConfig) -> SourceRef:
    """Find or fetch the dataset's files and digest them."""
    ref = find_source(config)
    get_run_logger().info("Dataset %s, digest %s", ref.uri, ref.digest[:12])
    return ref


def find_source(config: DataConfig) -> SourceRef:
    """Return a reference to the dataset's files, fetched where they are not here."""
    config = pin_sources(config)
    digest = digest_source(bring_sources(config))
    return SourceRef(uri=config.source, digest=digest, eval_uri=config.eval_source)


@task(
    name="read-shard",
    task_run_name="read shard {number}",
    cache_policy=stage_cache("ingestion"),
    persist_result=True,
    result_serializer=DigestedJson(),
)
def read_shard(shard: Shard, number: int, *, source_digest: str, publish: bool, parent_run_id: str) -> Ref:
    """Read one shard in a worker process, and keep what came out of it.

    Args:
        shard: what to read.
        number: its place among all shards.
        source_digest: contents of all files; another one is another result.
        publish: put it where another machine finds it too, and not only into this machine's cache.
        parent_run_id: MLflow run of the pipeline run.
    """
    with storage.new_folder() as folder:
        execution.call(finish_shard, shard, folder / "shard")
        if publish:
            uri, digest = tracking.publish(folder / "shard", parent_run_id, f"shards/{number:06d}")
            return Ref(uri=uri, digest=digest, mlflow_run_id=parent_run_id)
        digest = storage.digest_folder(folder / "shard")
        return Ref(uri=storage.keep_folder(folder / "shard", digest).as_uri(), digest=digest)


def _find_store(run_id: str, parent_run_id: str, conditions: str) -> Store | None:
    """Return where a cluster's workers put rows and tables by themselves; None where they come to this machine.

    They do so where the tracking server keeps artifacts in an object store that a worker can write to.
    """
    if not execution.spreads_to_cluster():
        return None
    tables = tracking.find_store(run_id, "dataset")
    scratch = tracking.find_store(parent_run_id, f"shards/{conditions}")
    if tables is None or scratch is None:
        return None
    (trouble,) = execution.map(try_store, [(scratch,)], parcel=lambda *_: Parcel(()))
    if trouble:
        get_run_logger().warning("What workers make comes to this machine: %s", trouble)
        return None
    return Store(tables, scratch)


def _read_shards(
    source: SourceRef, config: DataConfig, parent_run_id: str, store: Store | None
) -> Sequence[Path] | None:
    """Map the shards of a large dataset over the flow's task runner, and return their folders here.

    None leaves the reading to build_dataset: outside of a flow, of a small dataset, and of rows from the front. Shards
    that a cluster has read lie in the run's folder, their rows in the store, where the next attempt finds them.
    """
    flow_run = FlowRunContext.get()
    if flow_run is None or config.max_rows is not None:
        return None
    if execution.spreads_to_cluster():
        folder, tell = _find_cluster_folder(source, parent_run_id), log_progress(get_run_logger(), "Read")
        scratch = None if store is None else store.scratch
        return read_all(config, name_sources(config), folder, SHARD_BYTES, store=scratch, tell=tell)
    shards = list(plan_shards(config, name_sources(config), SHARD_BYTES))
    if is_small(shards, SHARD_BYTES):
        return None
    publish = not isinstance(flow_run.task_runner, ThreadPoolTaskRunner)
    settings: dict[str, Any] = {"source_digest": source.digest, "publish": publish, "parent_run_id": parent_run_id}
    apart: dict[str, Any] = {name: unmapped(value) for name, value in settings.items()}
    with keep_at_once():
        refs: list[Ref] = read_shard.map(shards, list(range(len(shards))), **apart).result()

    def repeat(number: int) -> Ref:
        return read_shard.with_options(refresh_cache=True)(shards[number], number, **settings)

    return [resolve_or_repeat(ref, partial(repeat, number)) for number, ref in enumerate(refs)]


def _find_cluster_folder(source: SourceRef, parent_run_id: str) -> Path:
    """Return where the shards of a run are that a cluster reads: of these contents, by this code."""
    conditions = digest_conditions("ingestion", source=source.digest)
    return storage.run_folder(parent_run_id) / "shards" / conditions[:16]


@task(
    name="ingest",
    task_run_name="ingest {source.uri}",
    cache_policy=stage_cache("ingestion"),
    persist_result=True,
    result_serializer=DigestedJson(),
)
def ingest(source: SourceRef, config: DataConfig, *, seed: int, parent_run_id: str) -> DatasetRef:
    """Turn raw rows into validated, split conversations, and account for every row."""
    timing = speeds.Timing()
    with tracking.stage_run(parent_run_id, "ingest", config) as run_id, storage.new_folder() as folder:
        try:
            # What was located is read: of a published dataset, the same version.
            located = bring_sources(config.model_copy(update={"source": source.uri, "eval_source": source.eval_uri}))
            store = _find_store(run_id, parent_run_id, _find_cluster_folder(source, parent_run_id).name)
            shards = _read_shards(source, located, parent_run_id, store)
            counts = build_dataset(located, seed=seed, folder=folder / "dataset", shards=shards, store=store)
            check_unchanged(located, source.digest)
            quality = json.loads((folder / "dataset" / "quality.json").read_text(encoding="utf-8"))
        except DataError:
            # What was refused stays readable where the run is.
            if (folder / "dataset" / "rejects.parquet").is_file():
                tracking.log_folder(run_id, folder / "dataset", "dataset")
            raise
        accounting = {
            "rows in": counts.rows_in,
            "trained": counts.rows_train,
            "held out": counts.rows_eval,
            "duplicates": counts.rows_duplicate,
            "leaked": counts.rows_leaked,
            **{f"rejected: {reason}": number for reason, number in counts.rows_rejected.items()},
        }
        apart = {"left out by sampling": counts.rows_left_out, "repeated by weight": counts.rows_repeated}
        accounting |= {name: number for name, number in apart.items() if number}
        shutil.rmtree(_find_cluster_folder(source, parent_run_id).parent, ignore_errors=True)
        if store is not None:
            remove_files(store.scratch)
        uri, digest = tracking.publish(folder / "dataset", run_id, "dataset")
        tracking.log_metrics(run_id, {f"rows/{name}".replace(":", ""): value for name, value in accounting.items()})
        tracking.set_tags(run_id, {"sft.source_digest": source.digest, "sft.dataset_digest": digest})
    timing.note("ingest", counts.rows_read, settings=speeds.write_settings({"screen": config.screen}))
    create_table_artifact([accounting], key="accounting", description="Where every row went")
    get_run_logger().info("Rows: %s", ", ".join(f"{name} {number:,}" for name, number in accounting.items()))
    return DatasetRef(
        uri=uri,
        digest=digest,
        mlflow_run_id=run_id,
        source_digest=source.digest,
        rows_in=counts.rows_in,
        rows_train=counts.rows_train,
        rows_eval=counts.rows_eval,
        rows_rejected=counts.rows_rejected,
        rows_duplicate=counts.rows_duplicate,
        rows_leaked=counts.rows_leaked,
        rows_read=counts.rows_read,
        warnings=tuple(quality["warnings"]),
    )
