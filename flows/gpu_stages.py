"""Where the stages that want a GPU run: on the GPU pool when a deployment started the run, else right here.

A run on the pool hands its result over as a small tag on the pipeline's MLflow run, so that parent and child need
share nothing but the two servers.
"""

import time
from contextlib import suppress
from pathlib import Path
from platform import node
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelling

from schemas.artifacts import AdapterRef, EvalReport, ModelRef, ProbesRef, Ref, TokensRef
from schemas.config import EvaluationConfig, ModelConfig, TrainingConfig
from tasks import tracking
from tasks.base_model import locate_base_model
from tasks.caching import is_cached, run_stage
from tasks.registry import bases
from tasks.training.records import TrainingCrash

TRAIN, EVALUATE = "train/train", "evaluate/evaluate"
_MAX_STARTS = 3  # of a stage whose process is lost; one that fails is not started again
_POLL_SECONDS = 2.0
_AWAY_SECONDS = 5.0
_RESULT_TAG = "sft.handed_over."
_LOSS_TAG = "sft.lost_on_pool."
_LONGEST_LOSS = 500  # of the 8,000 characters that MLflow keeps of a tag

R = TypeVar("R", bound=Ref)


class StageFailedError(ValueError):
    """A stage failed on the GPU pool; the message is its own."""


class StageLostError(RuntimeError):
    """A stage's process was lost again and again, or cancelled: the run can go on from its checkpoint."""


def prepare(config: TrainingConfig) -> None:
    """Where the training runs on this machine, see that it can, and have what it needs of a GPU imported meanwhile.

    Raises:
        TrainingError: it cannot.
    """
    if deployment.id is None:
        from tasks.training.process.ahead import start_ahead
        from tasks.training.process.launch import check_machine

        check_machine(config)
        start_ahead()


def train(
    base_model: ModelRef, tokens: TokensRef, config: TrainingConfig, *, seed: int, parent_run_id: str
) -> AdapterRef:
    """Train on the GPU pool, or here."""
    if deployment.id is None:
        from tasks.training import task as training  # a run on the pool loads what its own stage needs, and no more

        return training.train(base_model, tokens, config, seed=seed, parent_run_id=parent_run_id)
    parameters = {"base_model": base_model, "tokens": tokens, "config": config, "seed": seed}
    return _run_on_pool(TRAIN, "train", AdapterRef, parameters, parent_run_id)


def evaluate(
    model: ModelRef,
    tokens: TokensRef,
    config: EvaluationConfig,
    *,
    parent_run_id: str,
    probes: ProbesRef | None = None,
) -> EvalReport:
    """Evaluate on the GPU pool, or here; a result that this machine has cached is returned at once."""
    from tasks.evaluation.task import evaluate

    plain = ModelRef.model_validate(model.model_dump(include=set(ModelRef.model_fields)))  # without the merge's proof
    parameters: dict[str, Any] = {"model": plain, "tokens": tokens, "config": config, "probes": probes}
    if deployment.id is None or is_cached(evaluate, **parameters):
        report: EvalReport = run_stage(evaluate, **parameters, parent_run_id=parent_run_id).result()
        return report
    return _run_on_pool(EVALUATE, f"evaluate-{model.kind}", EvalReport, parameters, parent_run_id)


def hand_over(parent_run_id: str, stage: str, ref: Ref) -> None:
    """Leave a stage's result with the pipeline's MLflow run."""
    tracking.set_tags(parent_run_id, {_RESULT_TAG + stage: ref.model_dump_json()})


def read_losses(parent_run_id: str) -> tuple[str, ...]:
    """Return which processes of stages were lost on the pool, over all attempts of the run, the oldest first."""
    tags = tracking.get_run(parent_run_id).data.tags
    return tuple(tags[name] for name in sorted(tags) if name.startswith(_LOSS_TAG))


def note_loss(parent_run_id: str, sentence: str) -> None:
    """Keep a sentence on a loss with the pipeline's MLflow run: another attempt may bring the run to its end."""
    number = len(read_losses(parent_run_id)) + 1
    tracking.set_tags(parent_run_id, {f"{_LOSS_TAG}{number:04d}": sentence[:_LONGEST_LOSS]})


def bring_model(ref: ModelRef) -> ModelRef:
    """Return a reference that works on this machine: a hub model that another machine fetched is fetched here too.

    Raises:
        StageFailedError: the folder is not here, or holds something else.
    """
    if ref.kind != "base" or ref.uri.startswith(bases.SCHEME) or Path(ref.uri).is_dir():
        return ref
    if ref.revision is None:
        raise StageFailedError(
            f"{ref.uri}: no such folder on {node()}: mount the base model at the same path on all workers, or give "
            "the name of a model on the hub"
        )
    found = locate_base_model(ModelConfig(base_model=ref.name, revision=ref.revision))
    if found.digest != ref.digest:
        raise StageFailedError(
            f"{ref.name} @ {ref.revision} has digest {found.digest[:12]} on {node()}, but {ref.digest[:12]} where the "
            "run began: delete it from the hub's cache on both"
        )
    return found


def _take(parent_run_id: str, stage: str, kind: type[R]) -> R:
    return kind.model_validate_json(tracking.get_run(parent_run_id).data.tags[_RESULT_TAG + stage])


def _run_on_pool(name: str, stage: str, kind: type[R], parameters: dict[str, Any], parent_run_id: str) -> R:
    """Run a deployment to its end; start it again where its process was lost.

    Raises:
        StageFailedError: the stage itself failed.
        StageLostError: it was cancelled, or its process was lost at every start.
    """
    logger = get_run_logger()
    sent = {
        parameter: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for parameter, value in {**parameters, "parent_run_id": parent_run_id}.items()
    }
    for start in range(1, _MAX_STARTS + 1):
        # The key ties a child to this attempt of this run: asked twice it is the same child, after a retry a new one.
        key = f"{flow_run.id}-{stage}-{flow_run.run_count}-{start}"
        child = _follow(_start(name, sent, key))
        assert child.state is not None
        if child.state.is_completed():
            return _take(parent_run_id, stage, kind)
        where = f"{stage} on the GPU pool (flow run {child.name})"
        if child.state.is_failed() and TrainingCrash.__name__ in (child.state.message or ""):
            raise StageLostError(
                f"{where} failed, and the same run goes on from its last checkpoint: {child.state.message}"
            )
        if child.state.is_failed():
            raise StageFailedError(f"{where} failed: {child.state.message}")
        if not child.state.is_crashed():
            raise StageLostError(f"{where} ended {child.state.name}: a retry goes on from its last checkpoint")
        loss = f"{where} was lost at start {start} of {_MAX_STARTS}: {child.state.message}"
        logger.warning(loss)
        note_loss(parent_run_id, loss)
    raise StageLostError(f"{where} was lost {_MAX_STARTS} times: see its log; a retry goes on from its last checkpoint")


def _start(name: str, parameters: dict[str, Any], key: str) -> UUID:
    """Start a run of a deployment and return its id; a server that is away is waited for."""
    while True:
        try:
            child = run_deployment(name, parameters=parameters, idempotency_key=key, timeout=0)
        except ObjectNotFound:
            raise StageFailedError(f"deployment {name} is not known to the Prefect server: run `sft deploy`") from None
        except httpx.TransportError as error:
            _wait_for_server(error)
            continue
        assert isinstance(child, FlowRun)  # a coroutine only where the caller is one
        return child.id


def _follow(child_id: UUID) -> FlowRun:
    """Wait for a run to end, and return it; when this run ends before, the other is cancelled: it would hold a GPU."""
    try:
        while True:
            try:
                with get_client(sync_client=True) as client:
                    child = client.read_flow_run(child_id)
            except httpx.TransportError as error:
                _wait_for_server(error)
                continue
            if child.state is not None and child.state.is_final():
                return child
            time.sleep(_POLL_SECONDS)
    except BaseException:
        with suppress(Exception), get_client(sync_client=True) as client:  # a server that is away does it later
            client.set_flow_run_state(child_id, Cancelling(message="The pipeline run that wanted it has ended."))
        raise


def _wait_for_server(error: Exception) -> None:
    get_run_logger().warning("The Prefect server does not answer (%s): waiting for it", error)
    time.sleep(_AWAY_SECONDS)
