"""When a stage may be skipped: same inputs, same code, same libraries, same tracking server."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from prefect import Task
from prefect.cache_policies import CacheKeyFnPolicy, CachePolicy
from prefect.context import TaskRunContext
from prefect.results import ResultStore, get_result_store
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE
from prefect.transactions import CommitMode, Transaction, transaction
from pydantic import BaseModel

from schemas.artifacts import Ref
from tasks import tracking
from tasks.dependencies import digest_files, list_libraries

# Where a thing lies and which run made it does not change what it is.
_PLACE_FIELDS = {"uri", "eval_uri", "mlflow_run_id", "name"}


def stage_cache(stage: str) -> CacheKeyFnPolicy:
    """Return the cache policy of a stage's task.

    Prefect's own policies do not see the functions that a thin task calls, so the key holds a digest of all own modules
    that the stage's task.py reaches by import, and the versions of the libraries that these import.

    Args:
        stage: folder under tasks/.
    """
    return CacheKeyFnPolicy(cache_key_fn=_key_function(stage))


def is_cached(task: Task[..., Any], **inputs: Any) -> bool:
    """Tell whether this machine has kept a task's result for these inputs, so that calling it does no work."""
    if PREFECT_TASKS_REFRESH_CACHE.value() or not isinstance(task.cache_policy, CachePolicy):
        return False
    known: dict[str, Any] = {"task": task}  # all that a key of ours looks at
    context = TaskRunContext.model_construct(**known)
    key = task.cache_policy.compute_key(task_ctx=context, inputs=inputs, flow_parameters={})
    store = get_result_store().update_for_task(task)
    assert isinstance(store, ResultStore)  # a coroutine only where the caller is one
    return key is not None and store.exists(key)


def keep_at_once() -> AbstractContextManager[Transaction]:
    """Return a context in which tasks keep their results when they end.

    Inside a task Prefect otherwise keeps them when that one ends: killed before, it would do all of them again.
    """
    return transaction(commit_mode=CommitMode.EAGER)


def _key_function(stage: str) -> Callable[[TaskRunContext, dict[str, Any]], str]:
    def key(context: TaskRunContext, inputs: dict[str, Any]) -> str:
        canonical = {name: _canonical(value) for name, value in sorted(inputs.items()) if name != "parent_run_id"}
        tracked = tracking.tracking_uri()
        return digest_conditions(stage, task=context.task.task_key, inputs=canonical, tracking=tracked)

    return key


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
    return value
