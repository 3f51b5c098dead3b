"""The door of tokenization: conversations become examples with labels."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task, unmapped

from schemas.artifacts import DatasetRef, ModelRef, Ref, TokensRef
from schemas.config import TokenizationConfig
from tasks import execution, speeds, storage, tracking
from tasks.base_model import limit_length
from tasks.caching import DigestedJson, keep_at_once, resolve_or_repeat, stage_cache
from tasks.ingestion.quality_page import write_quality_page
from tasks.progress import log_progress
from tasks.stored_files import find_absent
from tasks.tokenization.examples import (
    PARTS,
    TokenCounts,
    config_of,
    join_shards,
    tokenize_dataset,
    tokenize_stored,
)
from tasks.tokenization.saving import check_saved, save_tokenizer
from tasks.tokenization.shards import TableShare, plan_shards, probe_tokenizer, work_on_shard
from tasks.tokenization.templates import PreparedTokenizer, prepare_tokenizer


@task(
    name="tokenize",
    task_run_name="tokenize for {base_model.name}",
    cache_policy=stage_cache("tokenization"),
    persist_result=True,
    result_serializer=DigestedJson(),
)
def tokenize(
    dataset: DatasetRef,
    base_model: ModelRef,
    config: TokenizationConfig,
    *,
    chat_template: str | None,
    template_file_digest: str | None,
    parent_run_id: str,
) -> TokensRef:
    """Render, tokenize and mask every conversation with the tokenizer that will ship.

    A dataset of several shards is mapped over the flow's task runner. `template_file_digest` is there for the cache: a
    template file may change under its name.
    """
    source = {"chat_template": chat_template, "template_file_digest": template_file_digest}
    timing = speeds.Timing()
    with tracking.stage_run(parent_run_id, "tokenize", config) as run_id, storage.new_folder() as folder:
        prepared, config, told = _open_tokenizer(base_model, chat_template, config)
        tokens = folder / "tokens"
        counts = _make_tokens(tokens, prepared, config, dataset=dataset, base_model=base_model, run_id=run_id, **source)
        uri, digest = tracking.publish(tokens, run_id, "tokens")
        _record(counts, run_id)
        tracking.set_tags(run_id, {"sft.template_digest": prepared.template_digest})
    timing.note("tokenize", counts.total_tokens)
    return TokensRef(
        uri=uri,
        digest=digest,
        mlflow_run_id=run_id,
        rows_train=counts.rows_train,
        rows_eval=counts.rows_eval,
        num_examples=counts.num_examples,
        num_eval_examples=counts.num_eval_examples,
        trained_tokens=counts.trained_tokens,
        total_tokens=counts.total_tokens,
        rows_rejected=counts.rows_rejected,
        template_digest=prepared.template_digest,
        warnings=(*told, *counts.warnings),
    )


def _open_tokenizer(
    base_model: ModelRef, chat_template: str | None, config: TokenizationConfig
) -> tuple[PreparedTokenizer, TokenizationConfig, tuple[str, ...]]:
    """Return the tokenizer that will ship, and the config with a length that the model has positions for.

    What was told of that length is a warning that the pipeline tells.
    """
    folder = tracking.resolve(base_model)
    prepared = prepare_tokenizer(folder, chat_template, config.template_arguments)
    config, told = limit_length(config, folder, base_model.name)
    for note in prepared.notes:
        get_run_logger().info("Tokenizer: %s", note)
    return prepared, config, (told,) if told else ()


def _make_tokens(
    folder: Path, prepared: PreparedTokenizer, config: TokenizationConfig, *, run_id: str, **source: Any
) -> TokenCounts:
    """Make the examples, here, on a cluster, or by mapping a large dataset's shards over the flow's task runner."""
    tell = log_progress(get_run_logger(), "Tokenized")
    if execution.spreads_to_cluster() and find_absent(dataset := tracking.resolve_some(source["dataset"])):
        place, target = tracking.find_address(source["dataset"]), tracking.find_store(run_id, "tokens")
        if place is not None and target is not None:
            return tokenize_stored(dataset, place, target, prepared, folder, config, tell=tell)
    dataset = tracking.resolve(source["dataset"])
    plans = {part: plan_shards(dataset / f"{part}.parquet") for part in PARTS}
    if max(map(len, plans.values())) == 1 or execution.spreads_to_cluster():
        return tokenize_dataset(dataset, prepared, folder, config, tell=tell)
    saved = folder / "tokenizer"
    save_tokenizer(prepared, saved)
    loaded = execution.submit(probe_tokenizer, saved, None)
    shards = _map_shards(dataset, plans, config, parent_run_id=run_id, **source)
    check_saved(prepared, saved, loaded.result())
    return join_shards(plans, shards, prepared, folder, config)


def _record(counts: TokenCounts, run_id: str) -> None:
    """Tell the log and MLflow what came out; the pipeline tells the warnings, those of a cached stage too."""
    share = counts.trained_tokens / counts.total_tokens
    tracking.log_metrics(
        run_id,
        {
            "tokens/examples": counts.num_examples,
            "tokens/trained": counts.trained_tokens,
            "tokens/total": counts.total_tokens,
            "tokens/trained_share": share,
            "tokens/rendered_anew": counts.num_rendered_anew,
        },
    )
    get_run_logger().info(
        "%s examples, %s tokens, %.0f %% of them trained",
        f"{counts.num_examples:,}",
        f"{counts.total_tokens:,}",
        100 * share,
    )


@task(
    name="tokenize-shard",
    task_run_name="tokenize rows of {file}, row groups {row_groups}",
    cache_policy=stage_cache("tokenization"),
    persist_result=True,
    result_serializer=DigestedJson(),
)
def tokenize_shard(
    dataset: DatasetRef,
    base_model: ModelRef,
    config: TokenizationConfig,
    *,
    file: str,
    row_groups: list[int],
    chat_template: str | None,
    template_file_digest: str | None,
    parent_run_id: str,
) -> Ref:
    """Make the examples of some row groups of a file of the dataset, in a process of their own.

    A finished shard is found again. `parent_run_id` is the run of the whole tokenization, which keeps its shards.
    """
    with storage.new_folder() as folder:
        table, model_folder = tracking.resolve(dataset) / file, tracking.resolve(base_model)
        execution.call(work_on_shard, table, row_groups, model_folder, chat_template, config, folder / "shard")
        names = [Path(name).stem for name in Path(file).parts]
        place = f"shards/{'-'.join(names)}-{row_groups[0] if row_groups else 0:06}"
        uri, digest = tracking.publish(folder / "shard", parent_run_id, place)
    return Ref(uri=uri, digest=digest, mlflow_run_id=parent_run_id)


def _map_shards(
    folder: Path, plans: Mapping[str, Sequence[TableShare]], config: TokenizationConfig, **common: Any
) -> dict[str, list[Path]]:
    """Map the shards of a dataset's folder over the flow's task runner, all parts at once; return their folders."""
    constant: dict[str, Any] = {name: unmapped(value) for name, value in common.items()}
    files = {part: [shard.file.relative_to(folder).as_posix() for shard in plan] for part, plan in plans.items()}
    with keep_at_once():
        futures = {
            part: tokenize_shard.map(
                config=unmapped(config_of(part, config)),
                file=files[part],
                row_groups=[shard.row_groups for shard in plan],
                **constant,
            )
            for part, plan in plans.items()
        }
        refs: dict[str, list[Ref]] = {part: listed.result() for part, listed in futures.items()}

    def repeat(part: str, number: int) -> Ref:
        again = tokenize_shard.with_options(refresh_cache=True)
        row_groups = plans[part][number].row_groups
        return again(config=config_of(part, config), file=files[part][number], row_groups=row_groups, **common)

    return {
        part: [resolve_or_repeat(ref, partial(repeat, part, number)) for number, ref in enumerate(refs[part])]
        for part in plans
    }


def log_quality(dataset: DatasetRef, tokens: TokensRef, base_model: ModelRef, parent_run_id: str) -> None:
    """Log the page on rows and masks with the pipeline run; also where both stages were found in the cache."""
    with storage.new_folder() as folder:
        places = tracking.resolve_some(dataset), tracking.resolve_some(tokens)
        quality, masks = (
            json.loads((place / name).read_text(encoding="utf-8"))
            for place, name in zip(places, ("quality.json", "masks.json"), strict=True)
        )
        page = write_quality_page(
            folder / "quality",
            quality,
            [place / "rejects.parquet" for place in places],
            masks,
            title=f"Rows and masks for {base_model.name}",
            warnings=tokens.warnings,
        )
        tracking.log_file(parent_run_id, page, "quality")
