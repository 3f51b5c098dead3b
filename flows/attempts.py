"""One pipeline run is one MLflow parent run, however often it is interrupted: open it, or go on with it."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from platform import node
from typing import Any

from prefect import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL

from flows.ending import ignore_signals
from flows.gpu_stages import StageLostError
from flows.records import describe_environment, keep_log
from schemas.artifacts import ModelRef, SourceRef
from schemas.config import SETTINGS_OF_PLACE, RunConfig
from tasks import storage, tracking
from tasks.registry.listing import find_run
from tasks.training.place import find_place
from tasks.training.records import TrainingCrash

_SOURCE_TAG, _MODEL_TAG = "sft.source_digest", "sft.base_model_digest"
_FLOW_RUN_TAG = "sft.prefect_flow_run"
_LONGEST_FAILURE = 500


class ResumeError(ValueError):
    """A run cannot be resumed with what it is given now."""


@contextmanager
def open_attempt(config: RunConfig, *, resume: str, run_name: str) -> Iterator[str]:
    """Give the MLflow parent run of this attempt, hold it while it lives, and end it as it ended.

    Args:
        config: of this attempt.
        resume: `auto` goes on with an interrupted run of the same config on this machine, if there is one, or with
            SFT_TEAM set on any that ended in an orderly way; `never` starts anew; anything else is the id of the run
            to go on with, or its beginning.
        run_name: of a new run.

    Raises:
        ResumeError: the run named by `resume` had another config, or has finished.
        ValueError: no run is named so, or several are.
    """
    digest = _digest_config(config)
    run_id = _choose_run(config, digest, resume)
    if run_id is None:
        tags = {"sft.git_commit": git_commit()}
        run_id = tracking.create_parent_run(config, run_name=run_name, config_digest=digest, tags=tags)
        tracking.log_text(run_id, describe_environment(), "environment/requirements.txt")
    else:
        get_run_logger().info("Going on with interrupted run %s", run_id)
        for change in _differences(tracking.recorded_config(run_id), config.model_dump(mode="json")):
            get_run_logger().info("It began with %s", change)
        tracking.reopen_run(run_id)
    tracking.set_tags(run_id, {_FLOW_RUN_TAG: flow_run.id, tracking.FAILURE_TAG: ""})  # why this attempt ends is open
    if PREFECT_UI_URL.value():  # a temporary server has no pages
        tracking.set_tags(run_id, {"sft.prefect_url": flow_run.ui_url})
    status = "KILLED"
    with storage.hold_run(run_id), keep_log(run_id):
        try:
            yield run_id
            ignore_signals()  # from here on it is finished, and a process that says otherwise is started again
            status = "FINISHED"
        except Exception as error:
            if not isinstance(error, (ResumeError, StageLostError, TrainingCrash)):
                status = "FAILED"  # the others: refused and nothing done, or cut short: the run can still be resumed
            with suppress(Exception):  # of tracking: why the run ended is told by its own error
                tracking.set_tags(run_id, {tracking.FAILURE_TAG: _describe_failure(error)})
            raise
        finally:
            tracking.end_run(run_id, status)


def _describe_failure(error: Exception) -> str:
    """Return the error's kind and its first line, as `sft runs` shows it."""
    first = str(error).partition("\n")[0].rstrip(":")
    return f"{type(error).__name__}: {first}"[:_LONGEST_FAILURE]


def check_inputs(run_id: str, source: SourceRef, base_model: ModelRef) -> None:
    """Record what the run works on; refuse when a resumed run finds something else than it began with.

    Raises:
        ResumeError: dataset or base model changed since the run began.
    """
    known = tracking.get_run(run_id).data.tags
    for what, tag, found in (
        ("dataset", _SOURCE_TAG, source.digest),
        ("base model", _MODEL_TAG, base_model.digest),
    ):
        before = known.get(tag, found)
        if before != found:
            raise ResumeError(
                f"the {what} changed since run {run_id} began (digest {before[:12]} then, {found[:12]} now): "
                "bring the old one back, or start a new run with --resume never"
            )
    tracking.set_tags(run_id, {_SOURCE_TAG: source.digest, _MODEL_TAG: base_model.digest})


def git_commit() -> str:
    """Return the commit of this code, with `-dirty` when files differ from it, or `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _digest_config(config: RunConfig) -> str:
    """Return a digest of all settings but those that say on how many GPUs a training runs: it goes on with others."""
    values = config.model_dump(mode="json", exclude={"training": set(SETTINGS_OF_PLACE)})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _choose_run(config: RunConfig, digest: str, resume: str) -> str | None:
    """Return the run to go on with, or None for a new one."""
    if resume == "never":
        return None
    if resume != "auto":
        return _named_run(config, digest, resume)
    if flow_run.run_count > 1:  # a retry of this Prefect run goes on in its own MLflow run, also after a failure
        for run in tracking.find_runs(config.name, _FLOW_RUN_TAG, str(flow_run.id)):
            if run.info.status != "FINISHED" and run.data.tags[tracking.CONFIG_TAG] == digest:
                return str(run.info.run_id)
    for run in tracking.find_interrupted_runs(config.name):
        run_id = str(run.info.run_id)
        here = run.data.tags.get(tracking.HOST_TAG) == node() and not storage.is_held(run_id)
        # Another machine left it in an orderly way: its checkpoint is in the place, for whoever comes.
        left = run.info.status == "KILLED" and find_place() is not None
        if (here or left) and run.data.tags[tracking.CONFIG_TAG] == digest:
            return run_id
    return None


def _named_run(config: RunConfig, digest: str, beginning: str) -> str:
    run = find_run(beginning)
    run_id = str(run.info.run_id)
    if run.info.status == "FINISHED":
        raise ResumeError(f"run {run_id} has finished: there is nothing to resume")
    if run.data.tags.get(tracking.CONFIG_TAG) != digest:
        changed = _differences(tracking.recorded_config(run_id), config.model_dump(mode="json"))
        raise ResumeError(
            f"run {run_id} began with another config: "
            + "; ".join(changed)
            + ". Resume it with its own settings, or start a new run with --resume never"
        )
    return run_id


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `section.field: before -> now` for every setting that differs."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old!r} -> {new!r}")
    return found
