"""Many pipeline runs at once on a served pipeline: do all end well, and what does a stage cost around its work?

Everything is real: both servers on a PostgreSQL server of its own, a CPU and a GPU worker as `sft serve` starts them,
the demo's base model and data. So that many runs end in minutes on two cores, a run trains a few steps and answers a
few held-out rows; rows, tables, model files and artifacts have the demo's size.

What is counted, for each stage that completed:

- `overhead`: seconds of the task from Prefect's Running to Completed, less the stage's own work, which is what its
  MLflow run says (`stage/seconds` less `stage/tracking_seconds`). Registration is tracking from end to end. So it holds
  the states at Prefect, the MLflow run, metrics, files going up and coming down, and digests. What a stage imports is
  imported before it begins (`start`, and the pipeline's own beginning), but for a training on a CPU: it imports torch
  within its own work.
- `between`: from one task's end to the next one's start in the pipeline's own process.
- for a stage on the GPU pool also `line` (from asking for it to a worker's taking it: its turn, and up to 2 s until the
  worker asks again), `start` (a Python process and its imports) and `back` (from its end until the pipeline goes on).

The last line is one JSON object. Exit code 1: a run failed, or two runs registered one version.
"""

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from flows.service.deployments import read_deployments
from tasks import tracking
from tests.end_to_end.service import ROOT, Service, make_secret, running_postgres, service_environment

_PIPELINE, _NAME = "sft-pipeline/sft-pipeline", "load-model"
_ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_LOOK_SECONDS = 5.0
_PAGE = 200  # what Prefect gives in one answer
Spans = dict[str, list[float]]


def main() -> None:
    """Run the benchmark and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=25.0, help="look at the queue then, whatever is left in it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then too
    home = Path(tempfile.mkdtemp(prefix="sft-load-"))
    secret = "load"
    with ExitStack() as stack:
        address = stack.enter_context(running_postgres(secret))
        variables = {"SFT_DATABASE_URL": f"postgresql://sft:{secret}@{address}"}
        service = Service(service_environment(home, HF_TOKEN=make_secret(), **variables), home)
        stack.callback(service.sft, "stop")
        service.sft("serve")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {**service.client, "SFT_HOME": str(home)}.items():
            patch.setenv(name, value)
        began = time.time()
        submitted = [service.start(_PIPELINE, {"config": make_config(number)}) for number in range(arguments.runs)]
        print(f"{len(submitted)} runs submitted in {time.time() - began:.1f} s; home {home}", flush=True)
        runs = watch(service, set(submitted), until=began + 60 * arguments.minutes)
        found = measure(service, runs) | {"seconds": round(time.time() - began, 1), "load": os.getloadavg()}
    print(json.dumps(found, ensure_ascii=False))
    sys.exit(0 if found["ok"] else 1)


def make_config(number: int) -> dict[str, Any]:
    """Return the demo's settings with little training; a seed of its own keeps a run from another's cache."""
    (deployment,) = (each for each in read_deployments() if each["name"] == "sft-pipeline")
    config: dict[str, Any] = json.loads(json.dumps(deployment["parameters"]["config"]))
    config |= {"name": "load", "seed": number}
    config["model"]["base_model"] = str(ROOT / config["model"]["base_model"])
    config["training"] |= {"max_steps": 8, "rank": 8, "alpha": 16}
    config["evaluation"] = {"max_examples": 16, "max_new_tokens": 8, "num_resamples": 200}
    config["merge"] = {"num_probes": 4, "probe_tokens": 4}
    config["registry"] = {"name": _NAME, "gate": {"metric": "nll"}}
    return config


def watch(service: Service, wanted: set[str], *, until: float) -> list[dict[str, Any]]:
    """Wait for the runs to end, or for the time to be over, and return them."""
    shown = ""
    while True:
        runs = [run for run in _read_all(service, "flow_runs") if run["id"] in wanted]
        states = Counter(run["state_name"] for run in runs)
        line = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        if line != shown:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            shown = line
        if time.time() > until or all(run["state_type"] in _ENDED for run in runs):
            return runs
        time.sleep(_LOOK_SECONDS)


def measure(service: Service, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how the runs ended, whether versions are each of one run, and the seconds around each stage."""
    states = Counter(run["state_name"] for run in runs)
    versions = tracking.client().search_model_versions(f"name = '{_NAME}'", max_results=1000)
    owners = Counter(version.tags.get("sft.run") for version in versions)
    bad = sum(run["state_type"] in ("FAILED", "CRASHED", "CANCELLED") for run in runs)
    numbers = [int(version.version) for version in versions]
    done = [run for run in runs if run["state_type"] == "COMPLETED"]
    spans = _collect_spans(service, {run["id"] for run in runs})
    return {
        "ok": bad == 0 and max(owners.values(), default=0) <= 1 and len(set(numbers)) == len(numbers),
        "runs": len(runs),
        "states": dict(states),
        "versions": len(numbers),
        "runs_with_two_versions": sum(count > 1 for count in owners.values()),
        "run_seconds": _summarize([run["total_run_time"] for run in done]),
        "stages": {
            stage: {kind: _summarize(values) for kind, values in kinds.items()} for stage, kinds in spans.items()
        },
    }


def _collect_spans(service: Service, wanted: set[str]) -> dict[str, Spans]:
    """Return seconds by stage and kind over the pipeline runs that are wanted."""
    flow_runs = {run["id"]: run for run in _read_all(service, "flow_runs")}
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for task in _read_all(service, "task_runs"):
        tasks[task["flow_run_id"]].append(task)
    children = {run["parent_task_run_id"]: run for run in flow_runs.values() if run["parent_task_run_id"]}
    found: dict[str, Spans] = defaultdict(lambda: defaultdict(list))
    for run_id, work in _read_work(wanted):
        steps = sorted((task for task in tasks[run_id] if task["end_time"]), key=lambda task: task["start_time"])
        # What stands for a run on the pool begins when the pool has it: its turn and its start come after.
        begins = [
            _moment(children[step["id"]]["created"] if step["id"] in children else step["start_time"]) for step in steps
        ]
        ended: float | None = None
        for at, step in enumerate(steps):
            begin, end = begins[at], _moment(step["end_time"])
            child = children.get(step["id"])
            stage = _stage_of(step, child)
            if child is None:
                if stage in work and step["state_name"] != "Cached":
                    found[stage]["overhead"].append(end - begin - work[stage])
                if ended is not None:
                    found[stage]["between"].append(begin - ended)
            else:
                (inner,) = (task for task in tasks[child["id"]] if task["end_time"])
                for kind, value in _child_spans(service, child, inner):
                    found[stage][kind].append(value)
                if stage in work and inner["state_name"] != "Cached":
                    inside = _moment(inner["end_time"]) - _moment(inner["start_time"])
                    found[stage]["overhead"].append(inside - work[stage])
                found[stage]["back"].append(min(begins[at + 1 :], default=end) - _moment(child["end_time"]))
            ended = max(ended or end, end)
    return found


def _child_spans(service: Service, child: dict[str, Any], inner: dict[str, Any]) -> Iterator[tuple[str, float]]:
    states = service.prefect("GET", f"/flow_run_states/?flow_run_id={child['id']}")
    taken = min(_moment(state["timestamp"]) for state in states if state["type"] == "PENDING")
    yield "line", taken - _moment(child["created"])
    yield "start", _moment(inner["start_time"]) - taken


def _stage_of(step: dict[str, Any], child: dict[str, Any] | None) -> str:
    """Return a task's stage by the name it has in MLflow."""
    if child is None:
        name = str(step["task_key"]).rsplit("-", 1)[0]
        return {"compare_models": "compare"}.get(name, name)
    parameters = child["parameters"]
    return "train" if "seed" in parameters else f"evaluate-{parameters['model']['kind']}"


def _read_work(wanted: set[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Give each pipeline run's id and the seconds of its stages' own work."""
    client = tracking.client()
    experiment = client.get_experiment_by_name("load")
    runs = client.search_runs([experiment.experiment_id], max_results=5000) if experiment else []
    for parent in runs:
        flow_run = parent.data.tags.get("sft.prefect_flow_run")
        if flow_run not in wanted or tracking.PARENT_TAG in parent.data.tags:  # a stage may name its flow run too
            continue
        stages = [run for run in runs if run.data.tags.get(tracking.PARENT_TAG) == parent.info.run_id]
        work = {
            run.data.tags[tracking.STAGE_TAG]: run.data.metrics["stage/seconds"]
            - run.data.metrics["stage/tracking_seconds"]
            for run in stages
            if "stage/seconds" in run.data.metrics
        }
        yield flow_run, {**work, "register": 0.0}


def _read_all(service: Service, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        body = {"limit": _PAGE, "offset": len(found), "sort": "ID_DESC"}
        page = service.prefect("POST", f"/{kind}/filter", body)
        found += page
        if len(page) < _PAGE:
            return found


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _summarize(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "n": len(ordered),
        "median": round(statistics.median(ordered), 2),
        "p90": round(ordered[math.ceil(0.9 * (len(ordered) - 1))], 2),
        "max": round(ordered[-1], 2),
    }


if __name__ == "__main__":
    main()
