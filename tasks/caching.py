"""When a stage may be skipped: same inputs, same code, same libraries, same tracking server."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
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

_ROOT = Path(__file__).resolve().parent.parent
# Where a thing lies and which run made it does not change what it is.
_PLACE_FIELDS = {"uri", "eval_uri", "mlflow_run_id", "name"}
_LIBRARIES = (
    "datasets",
    "ftfy",
    "numpy",
    "orjson",
    "pandera",
    "polars",
    "pyarrow",
    "rouge-score",
    "sacrebleu",
    "tokenizers",
    "torch",
    "transformers",
)


def stage_cache(stage: str, *uses: str) -> CacheKeyFnPolicy:
    """Return the cache policy of a stage's task.

    Prefect's own policies do not see the functions that a thin task calls, so the key holds a digest of the code of
    the stage, of the stages it `uses`, and of what all stages share.

    Args:
        stage: folder under tasks/.
        uses: further folders under tasks/ whose code the stage calls.
    """
    return CacheKeyFnPolicy(cache_key_fn=_key_function((stage, *uses)))


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


def _key_function(stages: tuple[str, ...]) -> Callable[[TaskRunContext, dict[str, Any]], str]:
    def key(context: TaskRunContext, inputs: dict[str, Any]) -> str:
        parts = {
            "task": context.task.task_key,
            "inputs": {name: _canonical(value) for name, value in sorted(inputs.items()) if name != "parent_run_id"},
            "code": digest_code(stages),
            "libraries": _list_libraries(),
            "tracking": tracking.tracking_uri(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    return key


def digest_conditions(stages: tuple[str, ...], **parts: Any) -> str:
    """Return the sha256 over what decides a stage's figures: its code, the libraries, and what else is named."""
    whole = {"code": digest_code(stages), "libraries": _list_libraries(), **parts}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _list_libraries() -> dict[str, str]:
    return {library: version(library) for library in _LIBRARIES}


def digest_code(stages: tuple[str, ...]) -> str:
    """Return the sha256 over the source files of these stages, the modules beside them, and schemas/."""
    folders = [_ROOT / "schemas", *(_ROOT / "tasks" / stage for stage in ("tracking", *stages))]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".jinja")]
    files += (_ROOT / "tasks").glob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, Ref):
        return value.model_dump(mode="json", exclude=_PLACE_FIELDS)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value
