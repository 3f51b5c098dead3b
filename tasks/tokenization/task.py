"""The door of tokenization: conversations become examples with labels."""

from prefect import get_run_logger, task

from schemas.artifacts import DatasetRef, ModelRef, TokensRef
from schemas.config import TokenizationConfig
from tasks import storage, tracking
from tasks.caching import stage_cache
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.templates import prepare_tokenizer


@task(
    name="tokenize",
    task_run_name="tokenize for {base_model.name}",
    cache_policy=stage_cache("tokenization"),
    persist_result=True,
    result_serializer="json",
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

    `template_file_digest` is there for the cache: a template file may change under its name.
    """
    with tracking.stage_run(parent_run_id, "tokenize") as run_id, storage.new_folder() as folder:
        prepared = prepare_tokenizer(tracking.resolve(base_model), chat_template)
        for note in prepared.notes:
            get_run_logger().info("Tokenizer: %s", note)
        counts = tokenize_dataset(tracking.resolve(dataset), prepared, folder / "tokens", config)
        uri, digest = tracking.publish(folder / "tokens", run_id, "tokens")
        tracking.log_metrics(
            run_id,
            {
                "tokens/examples": counts.num_examples,
                "tokens/trained": counts.trained_tokens,
                "tokens/total": counts.total_tokens,
                "tokens/trained_share": counts.trained_tokens / counts.total_tokens,
            },
        )
        tracking.set_tags(run_id, {"sft.template_digest": prepared.template_digest})
    get_run_logger().info(
        "%s examples, %s tokens, %.0f %% of them trained",
        f"{counts.num_examples:,}",
        f"{counts.total_tokens:,}",
        100 * counts.trained_tokens / counts.total_tokens,
    )
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
    )
