"""The flow that evaluates on the GPU pool."""

from prefect import flow

from flows.cancellation import cancel_with_server
from flows.gpu_stages import bring_model, hand_over
from schemas.artifacts import ModelRef, ProbesRef, TokensRef
from schemas.config import EvaluationConfig
from tasks.caching import run_stage


@flow(name="evaluate", flow_run_name="evaluate {model.name}")
def evaluate_on_pool(
    model: ModelRef, tokens: TokensRef, config: EvaluationConfig, parent_run_id: str, probes: ProbesRef | None = None
) -> None:
    """Score a model on the held-out rows for a pipeline run, and leave the result with its MLflow run.

    Args:
        model: base or merged model.
        tokens: the held-out rows.
        config: evaluation settings.
        parent_run_id: MLflow run of the pipeline.
        probes: further held-out sets.
    """
    from tasks.evaluation.task import evaluate  # not at the top: a worker imports this module to cancel a run

    with cancel_with_server():
        report = run_stage(
            evaluate, bring_model(model), tokens, config, probes=probes, parent_run_id=parent_run_id
        ).result()
    hand_over(parent_run_id, f"evaluate-{model.kind}", report)
