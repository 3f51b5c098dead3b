"""Merging's task: base and adapter, or trained weights, become one model, which is compared with what was trained."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from schemas.artifacts import AdapterRef, DatasetRef, MergeCheck, MergedRef, ModelRef, Ref, TokensRef
from schemas.config import MergeConfig
from tasks import speeds, storage, tracking
from tasks.evaluation.scoring import find_last_run
from tasks.merging.parity import check_merge
from tasks.merging.shards import PlannedTensor
from tasks.merging.verification import WrittenTensors, describe_unmoved, verify_tensors
from tasks.merging.weights import merge_adapter
from tasks.proving.recording import record_answers
from tasks.registry.versions import log_merged_model

ANSWERS = "serving_probes"


@task(
    name="merge",
    task_run_name="merge into {base_model.name}",
    cache_policy=NO_CACHE,
    persist_result=True,
    result_serializer="json",
)
def merge(
    base_model: ModelRef,
    adapter: AdapterRef,
    tokens: TokensRef,
    dataset: DatasetRef,
    config: MergeConfig,
    *,
    parent_run_id: str,
) -> MergedRef:
    """Merge, reload from disk, compare with what was trained, and only then log the model."""
    if (done := tracking.recall(parent_run_id, "merge", MergedRef)) is not None:
        return done
    timing = speeds.Timing()
    with tracking.stage_run(parent_run_id, "merge", config) as run_id, storage.new_folder() as folder:
        base_folder, adapter_folder = map(tracking.resolve, (base_model, adapter))
        tokens_folder = tracking.resolve_some(tokens, *_name_asked(tokens.num_eval_examples))
        merged = folder / "model"
        plan = merge_adapter(
            base_folder,
            adapter_folder,
            tokens_folder / "tokenizer",
            merged,
            max_shard_size=config.max_shard_size,
            card=_name_origin(base_model, dataset, adapter, parent_run_id),
        )
        probes = _read_probes(tokens_folder, config.num_probes)
        with ThreadPoolExecutor(max_workers=1) as beside:
            stored = beside.submit(_store, merged, plan)
            check = check_merge(base_folder, adapter_folder, merged, _prompts(probes, config.num_probes), config)
            digest, written = stored.result()
        rows_folder = tracking.resolve_some(dataset, *_name_asked(dataset.rows_eval))
        answers = record_answers(base_folder, merged, rows_folder, folder / ANSWERS)
        check = check.model_copy(update={"num_changed": written.num_changed, "num_kept": written.num_kept})
        shown = {name: float(value) for name, value in check.model_dump().items()}
        uri = log_merged_model(merged, run_id, question=str(probes["question"][0]))
        # After the model: MLflow would ask for the history of each metric that is there before.
        measured = {f"merge/{name}": value for name, value in shown.items()}
        tracking.log_metrics(run_id, measured, model_id=uri.removeprefix("models:/"))
        storage.keep_folder(merged, digest)
        recorded = tracking.publish(answers, run_id, ANSWERS)
        ref = MergedRef(
            uri=uri,
            digest=digest,
            mlflow_run_id=run_id,
            name=f"{base_model.name}-merged",
            revision=base_model.revision,
            check=check,
            answers=Ref(uri=recorded[0], digest=recorded[1], mlflow_run_id=run_id),
        )
        tracking.remember(run_id, ref)
    timing.note("merge", 1, shape=speeds.describe_shape(base_folder))
    create_table_artifact([shown], key="merge-check", description="Merged model against base + adapter")
    _tell(check, "Merged" if adapter.method == "lora" else "Written", describe_unmoved(written))
    return ref


def _name_origin(base_model: ModelRef, dataset: DatasetRef, adapter: AdapterRef, run: str) -> dict[str, str]:
    """Return what the merged model's card says that it was made of."""
    return {
        "base_model": base_model.name,
        "base_model_revision": base_model.revision or "",
        "base_model_digest": base_model.digest,
        "dataset_digest": dataset.digest,
        "adapter_digest": adapter.digest,
        "mlflow_run_id": run,
    }


def _tell(check: MergeCheck, done: str, unmoved: str) -> None:
    """Log how the merged model compares with what was trained, and a warning where something has not moved."""
    logger = get_run_logger()
    logger.info(
        "%s: largest logit difference %.2e, greedy agreement %.1f %%; %d tensors changed, %d are the base's",
        done,
        check.max_abs_logit_diff,
        100 * check.greedy_agreement,
        check.num_changed,
        check.num_kept,
    )
    if unmoved:
        logger.warning(unmoved)


def _store(folder: Path, plan: Sequence[PlannedTensor]) -> tuple[str, WrittenTensors]:
    """Wait until a folder is on the disk; return its digest, and what its files hold."""
    storage.sync_folder(folder)
    return storage.digest_folder(folder), verify_tensors(plan, folder)


def _name_asked(num_held_out: int) -> tuple[str, ...]:
    """Return the tables of which rows are asked: trained ones only where nothing was held out."""
    return ("eval.parquet",) if num_held_out else ("eval.parquet", "train.parquet")


def _read_probes(tokens: Path, num_probes: int) -> pl.DataFrame:
    """Return the first held-out examples; where nothing was held out, the first that were trained."""
    columns = ["question", "input_ids", "labels"]
    held_out = pl.read_parquet(tokens / "eval.parquet", columns=columns, n_rows=num_probes)
    if not held_out.is_empty():
        return held_out
    return pl.read_parquet(tokens / "train.parquet", columns=columns, n_rows=num_probes)


def _prompts(examples: pl.DataFrame, num_probes: int) -> list[list[int]]:
    """Return the prompts of the first examples: the ids before the last answer."""
    prompts = []
    for ids, labels in examples.select("input_ids", "labels").head(num_probes).iter_rows():
        answer = find_last_run(labels)
        assert answer is not None, "an example without trained tokens"
        prompts.append(ids[: answer[0]])
    return prompts
