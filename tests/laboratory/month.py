"""A month of a home, told by its bytes: runs are recorded day after day, the days pass, and `sft clean` comes by.

    python -m tests.laboratory.month --home HOME --days 30 --runs 10

HOME holds finished runs: the newest of them is recorded again and again by the product's own functions (stages with
their parameters, curves and artifacts, cache, checkpoints, model, version), in Prefect's database by its server's.
A day passes by moving every time that is kept, of files and of rows, a day back.
"""

import argparse
import asyncio
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

DAY_SECONDS = 86_400.0
STAGES = ("ingest", "tokenize", "evaluate-base", "train", "merge", "evaluate-merged", "compare", "register")
_MLFLOW_TIMES = {
    "runs": ("start_time", "end_time"),
    "logged_models": ("creation_timestamp_ms", "last_updated_timestamp_ms"),
    "model_versions": ("creation_time", "last_updated_time"),
}
_PREFECT_TIMES = {
    "flow_run": ("start_time", "end_time", "expected_start_time", "created", "updated"),
    "task_run": ("start_time", "end_time", "expected_start_time", "created", "updated"),
    "log": ("timestamp", "created", "updated"),
    "events": ("occurred", "received"),
    "event_resources": ("occurred",),
    "artifact": ("created", "updated"),
}


@dataclass
class Stage:
    """What a stage leaves in MLflow."""

    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    folder: Path | None = None


@dataclass
class Template:
    """A run that is recorded again and again."""

    name: str
    model: Path
    """Folder of the merged model, called `model`."""
    stages: dict[str, Stage]
    num_tasks: int = 11
    num_logs: int = 38
    num_events: int = 55


def read_template(folder: Path) -> Template:
    """Copy what the newest finished run of the home in force has left."""
    from tasks import tracking

    client = tracking.client()
    experiments = [each.experiment_id for each in client.search_experiments()]
    query = "tags.`sft.version` LIKE '%' AND attributes.status = 'FINISHED' AND tags.`sft.verdict` LIKE '%'"
    run = client.search_runs(experiments, query, order_by=["attributes.start_time DESC"], max_results=1)[0]
    children = client.search_runs(experiments, f"tags.`{tracking.PARENT_TAG}` = '{run.info.run_id}'")
    stages = {}
    for child in children:
        history = [each for key in child.data.metrics for each in client.get_metric_history(child.info.run_id, key)]
        place = folder / child.data.tags[tracking.STAGE_TAG]
        client.download_artifacts(child.info.run_id, "", str(_made(place)))
        stages[place.name] = Stage(dict(child.data.params), history, place)
    (model,) = client.search_logged_models(
        experiments, f"source_run_id = '{next(c.info.run_id for c in children if c.info.run_name == 'merge')}'"
    )
    source = Path(model.artifact_location.removeprefix("file://")) / "artifacts" / "model"
    shutil.copytree(source, folder / "logged" / "model")
    return Template(str(run.data.tags["sft.version"]).partition("/")[0], folder / "logged" / "model", stages)


def record_run(template: Template, number: int) -> str:
    """Record a run in MLflow, cache and checkpoints, and return its id."""
    from schemas.config import RunConfig
    from tasks import storage, tracking
    from tasks.registry import versions

    config = RunConfig.model_validate(
        {"name": template.name, "seed": number, "model": {"base_model": "m"}, "data": {"source": "d.jsonl"}}
    )
    run_id = tracking.create_parent_run(config, run_name=f"run {number}", config_digest=f"{number:064x}", tags={})
    tracking.log_text(run_id, "log\n" * 200, "logs/run-1.log")
    with storage.hold_run(run_id):
        (storage.run_folder(run_id) / "train").mkdir()
        model_run, model_uri = "", ""
        for name, stage in template.stages.items():
            with tracking.stage_run(run_id, name) as child:
                _log_stage(stage, child)
                with storage.new_folder() as folder:
                    made = _copy(stage.folder, folder / name, number)
                    _, digest = tracking.publish(made, child, name)
                tracking.set_tags(child, {"sft.result": f'{{"uri":"runs:/{child}/{name}","digest":"{digest}"}}'})
                if name == "train":
                    shutil.copytree(
                        storage.cached_folder(digest) or made, storage.run_folder(run_id) / "train" / "last"
                    )
                if name == "merge":
                    with storage.new_folder() as folder:
                        merged = _copy(template.model, folder / "model", number)
                        model_uri = versions.log_merged_model(merged, child, question="hi")
                        storage.keep_folder(merged, storage.digest_folder(merged))
                    model_run = child
        tags = {versions.RUN_TAG: run_id, versions.GATE_TAG: "refused"}
        versions.create_version(template.name, model_uri, run_id=model_run, metrics={"nll": 1.0}, tags=tags)
    tracking.end_run(run_id, "FINISHED")
    return run_id


def _log_stage(stage: Stage, run_id: str) -> None:
    from mlflow.entities import Param

    from tasks import tracking

    params = [Param(name, value) for name, value in stage.params.items()]
    for start in range(0, max(len(stage.metrics), 1), 900):
        tracking.client().log_batch(run_id, metrics=stage.metrics[start : start + 900], params=params)
        params = []


def _copy(source: Path | None, target: Path, number: int) -> Path:
    """Copy a folder and make it another's than any other run's."""
    if source is None:
        _made(target)
    else:
        shutil.copytree(source, target)
    (target / "number.txt").write_text(f"{number}\n")
    return target


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def record_flow_runs(template: Template, number: int) -> None:
    """Record so many flow runs in Prefect's database, each with tasks, logs, an artifact and events."""
    asyncio.run(_record_flow_runs(template, number))


async def _record_flow_runs(template: Template, number: int) -> None:
    from prefect.server import models
    from prefect.server.database import provide_database_interface
    from prefect.server.events.schemas.events import ReceivedEvent, Resource
    from prefect.server.events.storage.database import write_events
    from prefect.server.schemas import actions, core, states
    from prefect.types._datetime import now

    database = provide_database_interface()
    await database.create_db()
    store: Any = models
    for _ in range(number):
        async with database.session_context(begin_transaction=True, with_for_update=True) as session:
            flow = await store.flows.create_flow(session=session, flow=core.Flow(name="sft-pipeline"))
            ended: Any = states.Completed()
            run = await store.flow_runs.create_flow_run(
                session=session,
                flow_run=core.FlowRun(flow_id=flow.id, state=ended, start_time=now("UTC"), end_time=now("UTC")),
            )
            for task in range(template.num_tasks):
                await store.task_runs.create_task_run(
                    session=session,
                    task_run=core.TaskRun(
                        flow_run_id=run.id, task_key=f"task-{task}", dynamic_key="0", state=states.Completed()
                    ),
                )
            logs = [
                actions.LogCreate(
                    name="prefect.flow_runs", level=20, message="x" * 120, timestamp=now("UTC"), flow_run_id=run.id
                )
                for _ in range(template.num_logs)
            ]
            await store.logs.create_logs(session=session, logs=logs)
            artifact = core.Artifact(key="accounting", type="markdown", data="x" * 2000, flow_run_id=run.id)
            await store.artifacts.create_artifact(session=session, artifact=artifact)
            events = [
                ReceivedEvent(
                    id=uuid4(),
                    occurred=now("UTC"),
                    event="prefect.flow-run.heartbeat" if index % 2 else "prefect.task-run.Completed",
                    resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run.id}"}),
                    payload={"text": "x" * 400},
                )
                for index in range(template.num_events)
            ]
            await write_events(session=session, events=events)


def pass_days(home: Path, days: float) -> None:
    """Move every time that a home keeps so many days back."""
    for path in sorted(home.rglob("*"), reverse=True):
        if not path.is_symlink() and path.suffix not in (".db", ".db-wal", ".db-shm"):
            then = path.stat().st_mtime - days * DAY_SECONDS
            os.utime(path, (then, then))
    if (home / "mlflow.db").is_file():
        milliseconds = int(days * DAY_SECONDS * 1000)
        _move(home / "mlflow.db", _MLFLOW_TIMES, f"{{0}} - {milliseconds}")
    if (home / "prefect" / "prefect.db").is_file():
        moved = f"strftime('%Y-%m-%d %H:%M:%f000', {{0}}, '-{days * DAY_SECONDS:.0f} seconds')"
        _move(home / "prefect" / "prefect.db", _PREFECT_TIMES, moved)


def _move(path: Path, times: Mapping[str, tuple[str, ...]], expression: str) -> None:
    with closing(sqlite3.connect(path, timeout=60)) as database, database:
        for table, columns in times.items():
            changes = ", ".join(f"{column} = {expression.format(column)}" for column in columns)
            database.execute(f"UPDATE {table} SET {changes}")


def measure_home(home: Path) -> dict[str, int]:
    """Return the bytes of each file and folder of a home."""
    from flows.cleaning import measure

    return {path.name: measure(path) for path in sorted(home.iterdir())}


def live(
    template: Template, *, days: int, runs: int, keep_days: float, keep_versions: int, first: int = 0
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Let days pass with so many runs each; give the home's bytes before and after the cleaning of every day."""
    from flows.record_cleaning import clean_up, survey
    from tasks import storage

    for day in range(days):
        for number in range(runs):
            record_run(template, first + day * runs + number)
        record_flow_runs(template, runs)
        before = measure_home(storage.home())
        clean_up(survey(days=keep_days, runs=None, versions=keep_versions, interrupted=False))
        yield before, measure_home(storage.home())
        pass_days(storage.home(), 1)


def main() -> int:
    """Print a line a day."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="home with at least one finished run")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--keep-days", type=float, default=7)
    parser.add_argument("--keep-versions", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, where some are recorded already")
    options = parser.parse_args()
    os.environ["SFT_HOME"] = str(options.home.absolute())
    from flows.console import prepare_environment

    prepare_environment(cache=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sft-month-") as folder:
        template = read_template(Path(folder))
        lived = live(
            template,
            days=options.days,
            runs=options.runs,
            keep_days=options.keep_days,
            keep_versions=options.keep_versions,
            first=options.first,
        )
        for day, (before, after) in enumerate(lived, 1):
            parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in after.items())
            totals = f"{sum(before.values()) / 1e6:.1f} MB, cleaned {sum(after.values()) / 1e6:.1f} MB"
            print(f"day {day}: {totals} ({parts}), {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
