"""The door of registration: a merged model becomes a version, and the gate decides what it may be called."""

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from schemas.artifacts import ComparisonReport, DatasetRef, MergedRef, ModelRef, RegistryEntry, TokensRef
from schemas.config import RegistryConfig
from tasks import tracking
from tasks.registration.gate import judge
from tasks.registration.versions import (
    CHALLENGER,
    CHAMPION,
    aliases_of,
    create_version,
    find_version,
    set_alias,
)

_RUN_TAG = "sft.run"


@task(name="register", task_run_name="register {config.name}", cache_policy=NO_CACHE)
def register(
    merged: MergedRef,
    comparison: ComparisonReport,
    config: RegistryConfig,
    *,
    base_model: ModelRef,
    dataset: DatasetRef,
    tokens: TokensRef,
    git_commit: str,
    parent_run_id: str,
) -> RegistryEntry:
    """Register the model as challenger, and as champion when the gate says so."""
    with tracking.stage_run(parent_run_id, "register") as run_id:
        verdict, reasons = judge(comparison.delta, config.gate)
        tags = {
            _RUN_TAG: parent_run_id,
            "sft.dataset_digest": dataset.digest,
            "sft.source_digest": dataset.source_digest,
            "sft.base_model": base_model.name,
            "sft.base_model_revision": base_model.revision or "",
            "sft.base_model_digest": base_model.digest,
            "sft.model_digest": merged.digest,
            "sft.template_digest": tokens.template_digest,
            "sft.git_commit": git_commit,
            "sft.prefect_flow_run": str(flow_run.id or ""),
            "sft.gate_verdict": verdict,
            "sft.gate_reasons": "; ".join(reasons),
        }
        # A resumed run may have registered already: the version is found again by its run.
        version = find_version(config.name, _RUN_TAG, parent_run_id) or create_version(
            config.name,
            merged.uri,
            run_id=str(merged.mlflow_run_id),
            metrics=comparison.after,
            tags=tags,
            description=f"{base_model.name} fine-tuned on {dataset.rows_train:,} rows. {'; '.join(reasons)}",
        )
        set_alias(config.name, CHALLENGER, version)
        if verdict == "promoted":
            set_alias(config.name, CHAMPION, version)
        aliases = aliases_of(config.name, version)
        tracking.set_tags(run_id, tags)
    get_run_logger().info("%s version %s: %s. %s", config.name, version, verdict, "; ".join(reasons))
    link = tracking.ui_link(parent_run_id)
    place = f"[MLflow run]({link})" if link else f"MLflow run `{parent_run_id}`"
    listed = "\n".join(f"- {reason}" for reason in reasons)
    create_markdown_artifact(
        f"## {config.name} version {version}: {verdict}\n\n{listed}\n\n{place}",
        key="registry",
        description="What the gate said",
    )
    return RegistryEntry(name=config.name, version=version, aliases=aliases, verdict=verdict, reasons=reasons)
