"""The flow that trains on the GPU pool: one training at a time, and one of a run."""

from prefect import flow

from flows.cancellation import cancel_with_server
from flows.gpu_stages import bring_model, hand_over
from schemas.artifacts import ModelRef, TokensRef
from schemas.config import TrainingConfig
from tasks import storage
from tasks.training.task import train

_WAIT_SECONDS = 120.0


@flow(name="train", flow_run_name="train {base_model.name}")
def train_on_pool(
    base_model: ModelRef, tokens: TokensRef, config: TrainingConfig, seed: int, parent_run_id: str
) -> None:
    """Train a LoRA adapter for a pipeline run, and leave the result with its MLflow run.

    Args:
        base_model: what is trained.
        tokens: the examples.
        config: training settings.
        seed: of order, dropout and the adapter's start.
        parent_run_id: MLflow run of the pipeline.
    """
    # A run that the server gave up may still be alive here: two must not write its checkpoints, and that one will end.
    with cancel_with_server(), storage.hold_run(f"{parent_run_id}/train", wait_seconds=_WAIT_SECONDS):
        adapter = train(bring_model(base_model), tokens, config, seed=seed, parent_run_id=parent_run_id)
    hand_over(parent_run_id, "train", adapter)
