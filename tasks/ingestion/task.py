"""The door of ingestion: the base model and the dataset come in."""

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact

from schemas.artifacts import DatasetRef, ModelRef, SourceRef
from schemas.config import DataConfig, ModelConfig
from tasks import storage, tracking
from tasks.caching import stage_cache
from tasks.ingestion.base_model import locate_base_model
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.rejects import DataError
from tasks.ingestion.sources import digest_source
from tasks.registration.publication import bring_sources, pin_sources


@task(name="locate-model", task_run_name="locate {config.base_model}", persist_result=False)
def locate_model(config: ModelConfig) -> ModelRef:
    """Find or fetch the base model and digest it."""
    ref = locate_base_model(config)
    get_run_logger().info("Base model %s, digest %s", ref.name, ref.digest[:12])
    return ref


@task(name="locate-dataset", task_run_name="locate {config.source}", persist_result=False)
def locate_dataset(config: DataConfig) -> SourceRef:
    """Find or fetch the dataset's files and digest them."""
    config = pin_sources(config)
    digest = digest_source(bring_sources(config))
    ref = SourceRef(uri=config.source, digest=digest, eval_uri=config.eval_source)
    get_run_logger().info("Dataset %s, digest %s", ref.uri, ref.digest[:12])
    return ref


@task(
    name="ingest",
    task_run_name="ingest {source.uri}",
    cache_policy=stage_cache("ingestion"),
    persist_result=True,
    result_serializer="json",
)
def ingest(source: SourceRef, config: DataConfig, *, seed: int, parent_run_id: str) -> DatasetRef:
    """Turn raw rows into validated, split conversations, and account for every row."""
    with tracking.stage_run(parent_run_id, "ingest") as run_id, storage.new_folder() as folder:
        try:
            # What was located is read: of a published dataset, the same version.
            located = config.model_copy(update={"source": source.uri, "eval_source": source.eval_uri})
            counts = build_dataset(bring_sources(located), seed=seed, folder=folder / "dataset")
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
        uri, digest = tracking.publish(folder / "dataset", run_id, "dataset")
        tracking.log_metrics(run_id, {f"rows/{name}".replace(":", ""): value for name, value in accounting.items()})
        tracking.set_tags(run_id, {"sft.source_digest": source.digest, "sft.dataset_digest": digest})
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
    )
