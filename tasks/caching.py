"""When a stage may be skipped: same inputs, code, libraries and tracking server, and what it left is whole."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from prefect import Task
from prefect.cache_policies import CacheKeyFnPolicy, CachePolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore, get_result_store
from prefect.serializers import JSONSerializer
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, PREFECT_TASKS_REFRESH_CACHE
from prefect.transactions import CommitMode, Transaction, transaction
from pydantic import BaseModel, Field

from schemas.artifacts import Ref
from tasks import tracking
from tasks.dependencies import digest_files, list_libraries

logger = logging.getLogger(__name__)

CACHED = "Cached"
"""Name that Prefect gives the state of a task whose result was found."""
# Where a thing lies and which run made it does not change what it is.
_PLACE_FIELDS = {"uri", "eval_uri", "mlflow_run_id", "name"}

R = TypeVar("R", bound=Ref)


class DigestedJson(JSONSerializer[Any]):
    """JSON below the sha256 of its bytes: a kept result that was changed on the disk does not load."""

    type: str = Field(default="digested-json", frozen=True)

    def dumps(self, obj: Any) -> bytes:
        """Return the digest, a line feed and the JSON."""
        content = super().dumps(obj)
        return hashlib.sha256(content).hexdigest().encode() + b"\n" + content

    def loads(self, blob: bytes) -> Any:
        """Return the object; raise ValueError where the digest is that of other bytes."""
        digest, _, content = blob.partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise ValueError("its content is not what its digest says")
        return super().loads(content)


def stage_cache(stage: str) -> CacheKeyFnPolicy:
    """Return the cache policy of a stage's task.

    Prefect's own policies do not see the functions that a thin task calls, so the key holds a digest of all own modules
    that the stage's task.py reaches by import, and the versions of the libraries that these import.

    Args:
        stage: folder under tasks/.
    """
    return CacheKeyFnPolicy(cache_key_fn=_key_function(stage))


def is_cached(task: Task[..., Any], **inputs: Any) -> bool:
    """Tell whether this machine has kept a task's result for these inputs, whole, so that calling it does no work."""
    return read_kept(task, **inputs) is not None


def read_kept(task: Task[..., Any], **inputs: Any) -> Any:
    """Return what this machine has kept of a task for these inputs, where it is whole; else None."""
    if PREFECT_TASKS_REFRESH_CACHE.value() or not isinstance(task.cache_policy, CachePolicy):
        return None
    known: dict[str, Any] = {"task": task}  # all that a key of ours looks at
    context = TaskRunContext.model_construct(**known)
    key = task.cache_policy.compute_key(task_ctx=context, inputs=inputs, flow_parameters={})
    store = _open_store(task)
    if key is None or not store.exists(key):
        return None
    kept = store.read(key).result
    return None if isinstance(kept, Ref) and _find_loss(kept) is not None else kept


def run_stage(stage: Task[..., Any], *inputs: Any, **named: Any) -> State[Any]:
    """Run a stage and return its state, `CACHED` where a kept result was taken.

    Where the files of a kept result are gone or damaged, here and where they were published, the stage runs again.
    """
    state: State[Any] = stage(*inputs, **named, return_state=True)
    if state.name != CACHED:
        return state
    if (loss := _find_loss(state.result())) is not None:
        logger.warning("Stage %s runs again, its result is lost: %s", stage.name, loss)
        return stage.with_options(refresh_cache=True)(*inputs, **named, return_state=True)
    if (parent := named.get("parent_run_id")) and (owner := state.result().mlflow_run_id):
        # At once: what a run has taken must stay as long as it does.
        tracking.set_tags(parent, {f"{tracking.TAKES_TAG}{owner[:8]}": owner})
    return state


def resolve_or_repeat(ref: R, repeat: Callable[[], R]) -> Path:
    """Return the folder of a result, made again where its files are gone or damaged."""
    loss = _find_loss(ref)
    if loss is None:
        return tracking.resolve(ref)
    logger.warning("A part of a stage runs again, its result is lost: %s", loss)
    return tracking.resolve(repeat())


def _find_loss(ref: Ref) -> tracking.ArtifactError | None:
    try:
        if ref.mlflow_run_id and tracking.is_deleted(ref.mlflow_run_id):
            raise tracking.ArtifactError(f"MLflow run {ref.mlflow_run_id}, which made it, was deleted")
        tracking.check(ref)
    except tracking.ArtifactError as error:
        return error
    return None


def keep_at_once() -> AbstractContextManager[Transaction]:
    """Return a context in which tasks keep their results when they end.

    Inside a task Prefect otherwise keeps them when that one ends: killed before, it would do all of them again.
    """
    return transaction(commit_mode=CommitMode.EAGER)


def _key_function(stage: str) -> Callable[[TaskRunContext, dict[str, Any]], str]:
    def key(context: TaskRunContext, inputs: dict[str, Any]) -> str:
        canonical = {name: _canonical(value) for name, value in sorted(inputs.items()) if name != "parent_run_id"}
        tracked = tracking.tracking_uri()
        found = digest_conditions(stage, task=context.task.task_key, inputs=canonical, tracking=tracked)
        _drop_damaged(context.task, found)
        return found

    return key


def _open_store(task: Task[..., Any]) -> ResultStore:
    store = get_result_store()
    if store.result_storage is None:  # outside of a run: Prefect would start a server to ask it for this folder
        folder = LocalFileSystem(basepath=str(PREFECT_LOCAL_STORAGE_PATH.value()))
        store = store.model_copy(update={"result_storage": folder})
    found = store.update_for_task(task)
    assert isinstance(found, ResultStore)  # a coroutine only where the caller is one
    return found


def _drop_damaged(task: Task[..., Any], key: str) -> None:
    """Delete a kept result that was changed on the disk, or is that of another key, and say so."""
    path = Path(PREFECT_LOCAL_STORAGE_PATH.value()) / key
    if not path.is_file():
        return
    try:
        owner = Path(str(_open_store(task).read(key).metadata.storage_key)).name
        damage = None if owner == key else f"it is the result of {owner}"
    except Exception as error:  # whatever a reader says of bytes that are not its own
        damage = next(iter(str(error).splitlines()), type(error).__name__)
    if damage is not None:
        logger.warning("Kept result %s is damaged (%s): its stage runs again", path, damage)
        path.unlink(missing_ok=True)


def digest_conditions(stage: str, **parts: Any) -> str:
    """Return the sha256 over what decides a stage's result: its code, the libraries, and what else is named."""
    code, libraries = _describe_code(stage)
    whole = {"code": code, "libraries": libraries, **parts}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@cache
def _describe_code(stage: str) -> tuple[str, dict[str, str]]:
    """Return the digest of a stage's code and the versions of its libraries; a process keeps what it began with."""
    module = f"tasks.{stage}.task"
    return digest_files(module), list_libraries(module)


def _canonical(value: Any) -> Any:
    if isinstance(value, Ref):
        return value.model_dump(mode="json", exclude=_PLACE_FIELDS)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    return value
