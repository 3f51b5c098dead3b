"""The product whole on a GPU, story after story, each ending with a registered version: `make test-gpu`.

    python -m tests.gpu.acceptance --work /tmp/acceptance [--only NAME …] [--at-once 3]

The model is a Qwen3-0.6B of random weights, the rows are made; nothing is set for speed. Prints a line a story, a
table, and one JSON object as the last line. Exit code 1: a story failed, or had to be left out without being asked.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.benchmarks import inputs
from tests.benchmarks.sft_run import ROOT, SftRun, end_with_this_process, start_run

Report = dict[str, Any]
_LIMIT = 900.0
_LEFT_BYTES = 1 << 29
_APART = 0.01
"""Most that losses of one and of two GPUs may differ, relatively: they sum in another order, in bfloat16."""
_HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(0, free - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
print(len(held), flush=True)
sys.stdin.read()
"""


class StoryError(RuntimeError):
    """A story did not end as it has to."""


class LeftOutError(RuntimeError):
    """A story needs what this machine does not have."""


@dataclass(frozen=True)
class Inputs:
    """What the stories share."""

    work: Path
    model: Path
    rows: Path
    held_out: Path
    long_epochs: float

    def config(self, name: str, **training: Any) -> dict[str, Any]:
        """Return the settings of a run: those that a user would have to give, and the story's own."""
        return {
            "name": name,
            "model": {"base_model": str(self.model)},
            "data": {"source": str(self.rows), "eval_source": str(self.held_out)},
            "training": {"num_epochs": 1, **training},
            "registry": {"name": name, "gate": {"metric": "nll"}},
        }


def tell_demo(given: Inputs) -> Report:
    """The demo, as `make demo` runs it."""
    config = yaml.safe_load((ROOT / "deploy" / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    report = start_run(config, given.work / "demo").wait(_LIMIT)
    _expect(report["registry"]["verdict"] == "promoted", f"the demo's version is {report['registry']['verdict']}")
    return report


def tell_long(given: Inputs) -> Report:
    """More than two minutes of training with dropout, interrupted as by Ctrl-C, and gone on with."""
    config = given.config("long", num_epochs=given.long_epochs, dropout=0.05)
    folder = given.work / "long"
    first = start_run(config, folder)
    _wait(first, lambda: bool(first.checkpoints()), "a checkpoint")
    began = time.monotonic()
    os.killpg(first.process.pid, signal.SIGINT)
    code = first.process.wait(120)
    seconds = time.monotonic() - began
    _expect(code == 130, f"exit code {code} after Ctrl-C: {first.last_lines()}")
    reached = _find_last_step(first)
    second = start_run(config, folder)
    report = second.wait(_LIMIT)
    steps = report["training"]["steps"]
    _expect("Going on with interrupted run" in second.log.read_text(), "the second run did not go on with the first")
    _expect(0 < reached < steps, f"interrupted at step {reached} of {steps}")
    _expect(_count_runs(folder) == 1, "one interrupted run became several")
    _expect(
        report["durations_seconds"]["train"] > 120 or not _has_gpu(),
        f"the training took {report['durations_seconds']['train']} s after the interruption: more epochs are needed",
    )
    return {**report, "note": f"interrupted at step {reached}, ended {seconds:.0f} s later, gone on to step {steps}"}


def tell_fp8(given: Inputs) -> Report:
    """Frozen weights in FP8."""
    _need_gpu((9, 0), "FP8 products")
    return start_run(given.config("fp8", base_weights="fp8", max_steps=60), given.work / "fp8").wait(_LIMIT)


def tell_nf4(given: Inputs) -> Report:
    """Frozen weights in four bits (QLoRA)."""
    _need_gpu((7, 5), "bitsandbytes")
    if find_spec("bitsandbytes") is None:
        raise LeftOutError("bitsandbytes is not installed: pip install bitsandbytes")
    return start_run(given.config("nf4", base_weights="nf4", max_steps=60), given.work / "nf4").wait(_LIMIT)


def tell_general(given: Inputs) -> Report:
    """The general engine."""
    return start_run(given.config("general", engine="general", max_steps=60), given.work / "general").wait(_LIMIT)


def tell_shortage(given: Inputs) -> Report:
    """Another program takes nearly all of the GPU's memory in the middle of the training."""
    _need_gpu((7, 0), "a GPU's memory")
    config = given.config("shortage", max_steps=200, micro_batch=64, eval_every_steps=20)
    run = start_run(config, given.work / "shortage")
    _wait(run, lambda: "evaluation loss" in run.log.read_text(errors="replace"), "the first evaluation loss")
    with _holding_memory(_LEFT_BYTES) as num_bytes:
        _wait(run, lambda: "out of memory with the" in run.log.read_text(errors="replace"), "the shortage")
    report = run.wait(_LIMIT)
    return {**report, "note": f"{num_bytes / 2**30:.0f} GiB taken by another program: {_find_line(run, 'went on')}"}


def tell_lost_gpu(given: Inputs) -> Report:
    """Two GPUs: a process of one is killed and started again, then one GPU is gone; the losses stay what they were."""
    if _count_gpus() == 1:
        raise LeftOutError("needs two GPUs")
    config = given.config("lost-gpu", max_steps=80, checkpoint_every_steps=10, num_processes=2)
    undisturbed = start_run(config, given.work / "undisturbed")
    expected = read_curve(given.work / "undisturbed", undisturbed.wait(_LIMIT))
    folder = given.work / "lost-gpu"
    first = start_run(config, folder)
    _wait(first, lambda: bool(first.checkpoints()), "a checkpoint")
    ranks = [process for process in psutil.Process(first.process.pid).children(recursive=True) if _is_rank(process)]
    _expect(len(ranks) == 2, f"{len(ranks)} processes train")
    ranks[1].kill()
    _wait(first, lambda: "The training was lost and goes on" in first.log.read_text(errors="replace"), "the loss")
    again = _find_last_step(first)
    _wait(first, lambda: _find_last_step(first) > again, "another checkpoint")
    os.killpg(first.process.pid, signal.SIGINT)
    code = first.process.wait(120)
    _expect(code == 130, f"exit code {code} after Ctrl-C: {first.last_lines()}")
    reached, lost = _find_last_step(first), _find_line(first, "The training was lost")
    config["training"]["num_processes"] = 1
    second = start_run(config, folder, CUDA_VISIBLE_DEVICES="0")
    report = second.wait(_LIMIT)
    curve = read_curve(folder, report)
    _expect("It began with training.num_processes: 2 -> 1" in second.log.read_text(), "the second run did not go on")
    _expect(0 < reached < max(expected), f"interrupted at step {reached} of {max(expected)}")
    _expect(list(curve) == list(expected), f"steps {min(curve)} to {max(curve)} of {max(expected)}")
    apart = max(abs(curve[step] - expected[step]) / expected[step] for step in expected)
    _expect(apart < _APART, f"the losses are {apart:.2%} apart")
    return {**report, "note": f"{lost}; from step {reached} on one GPU; losses at most {apart:.3%} apart"}


def read_curve(folder: Path, report: Report) -> dict[int, float]:
    """Return the training losses of a run by its step, as MLflow has them."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/home/mlflow.db")
    experiment = client.get_run(report["mlflow_run_id"]).info.experiment_id
    of_stage = f"tags.mlflow.parentRunId = '{report['mlflow_run_id']}' AND attributes.run_name = 'train'"
    (stage,) = client.search_runs([experiment], of_stage)
    history = client.get_metric_history(stage.info.run_id, "train/loss")
    return {point.step: point.value for point in sorted(history, key=lambda point: point.step)}


def tell_service(given: Inputs) -> Report:
    """The service: a pipeline on the CPU pool, its training on the GPU pool, servers with log-ins."""
    from tests.end_to_end.service import Service, service_environment

    home = given.work / "service"
    home.mkdir(parents=True)
    roots = os.pathsep.join(str(path) for path in (given.model.parent, given.rows.parent, given.held_out.parent))
    variables = {"SFT_AUTH": "on", "PREFECT_HOME": str(home / "prefect"), "SFT_DATA_ROOTS": roots}
    served = Service(service_environment(home, **variables), home)
    served.sft("serve")
    try:
        began = time.monotonic()
        config = given.config("served", max_steps=60)
        flow_run = served.start("sft-pipeline/sft-pipeline", {"config": config})
        served.wait(flow_run, {"Completed"}, seconds=_LIMIT)
        seconds = time.monotonic() - began
        versions = _find_versions(served.client, "served")
    finally:
        served.sft("stop")
    _expect(versions == ["1"], f"the registry has the versions {versions}")
    return {"registry": {"name": "served", "version": "1"}, "whole_seconds": round(seconds, 1)}


STORIES: dict[str, Callable[[Inputs], Report]] = {
    "demo": tell_demo,
    "long": tell_long,
    "fp8": tell_fp8,
    "nf4": tell_nf4,
    "general": tell_general,
    "service": tell_service,
    "shortage": tell_shortage,
    "lost-gpu": tell_lost_gpu,
}
_ALONE = ("shortage", "lost-gpu")
"""Stories that would starve the others."""
_OF_TWO_GPUS = ("lost-gpu",)
"""Stories that are told without being asked for where there are two GPUs."""


def main() -> int:
    """Tell the stories and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sft-acceptance"), help="model, rows, homes and logs")
    parser.add_argument("--only", nargs="*", choices=list(STORIES), metavar="NAME")
    parser.add_argument("--at-once", type=int, default=1, help="stories side by side; each takes some GiB of the GPU")
    parser.add_argument("--rows", type=int, default=14_000, help="how many are made")
    parser.add_argument("--tokenizer", type=Path, help="folder of the model's tokenizer; one is trained without it")
    parser.add_argument("--long-epochs", type=float, default=4.0, help="of the story that trains for minutes")
    options = parser.parse_args()
    if options.only is None:
        options.only = [name for name in STORIES if name not in _OF_TWO_GPUS or _count_gpus() > 1]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and what it starts
    end_with_this_process()
    given = prepare(options)
    results: dict[str, Report] = {}
    side_by_side = [name for name in options.only if name not in _ALONE]
    with ThreadPoolExecutor(options.at_once) as pool:
        for name, result in zip(side_by_side, pool.map(lambda name: tell(name, given), side_by_side), strict=True):
            results[name] = result
    for name in options.only:
        if name in _ALONE:
            results[name] = tell(name, given)
    return report(results)


def prepare(options: argparse.Namespace) -> Inputs:
    """Make model and rows, unless they are there."""
    from transformers import AutoTokenizer

    options.work.mkdir(parents=True, exist_ok=True)
    shape = "qwen3-0.6b" if _has_gpu() else "tiny"
    model = inputs.make_model(options.work / shape, shape, options.tokenizer).absolute()
    rows = inputs.make_rows(options.rows, AutoTokenizer.from_pretrained(str(model)))
    train, held_out = inputs.write_rows(rows, options.work / "rows", max(1, min(200, len(rows) // 5)))
    work = options.work / time.strftime("%H%M%S")
    return Inputs(work.absolute(), model, train.absolute(), held_out.absolute(), options.long_epochs)


def tell(name: str, given: Inputs) -> Report:
    """Tell one story; its failure is its result."""
    began = time.monotonic()
    try:
        found = STORIES[name](given)
    except LeftOutError as error:
        found = {"left_out": str(error)}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    result = {**_summarize(found), "seconds": round(time.monotonic() - began, 1)}
    print(f"{name}: {json.dumps(result)}", flush=True)
    return result


def _summarize(found: Report) -> Report:
    """Return what is told of a run's report."""
    result: Report = {key: found[key] for key in ("error", "left_out", "note") if key in found}
    if "registry" in found:
        entry = found["registry"]
        result["version"] = f"{entry['name']}/{entry['version']}" + (
            f" ({entry['verdict']})" if "verdict" in entry else ""
        )
    if "training" in found:
        training = found["training"]
        result |= {
            "steps": training["steps"],
            "training_seconds": round(found["durations_seconds"]["train"], 1),
            "tokens_per_second": round(training["tokens_per_second"]),
            "peak_gib": round(training["peak_memory_bytes"] / 2**30, 1),
        }
    return result


def report(results: dict[str, Report]) -> int:
    """Print the table, and the JSON object as the last line; return the exit code."""
    print(
        f"\n{'story':10s} {'ended with':32s} {'seconds':>8s} {'training':>9s} {'steps':>6s} {'tok/s':>8s} {'GiB':>6s}"
    )
    for name, result in results.items():
        ended = result.get("version") or f"LEFT OUT: {result['left_out']}" if "error" not in result else "FAILED"
        numbers = (
            f"{result['training_seconds']:9.1f} {result['steps']:6d} {result['tokens_per_second']:8,d} "
            f"{result['peak_gib']:6.1f}"
            if "steps" in result
            else ""
        )
        print(f"{name:10s} {ended:32s} {result['seconds']:8.1f} {numbers}")
    for name, result in results.items():
        for what in ("error", "note"):
            if what in result:
                print(f"{name}: {result[what]}")
    import torch

    device = torch.cuda.get_device_name() if _has_gpu() else "none"
    print(json.dumps({"device": device, "torch": torch.__version__, "stories": results}))
    return int(any("version" not in result for result in results.values()))


@contextmanager
def _holding_memory(left: int) -> Iterator[int]:
    """Hold all of the GPU's free memory but `left` bytes in another process; give how many it got."""
    command = [sys.executable, "-c", _HOLD, str(left)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            yield int(holder.stdout.readline() or 0)
        finally:
            holder.kill()


def _wait(run: SftRun, holds: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; fail where the run ends or too much time passes first."""
    deadline = time.monotonic() + _LIMIT
    while not holds():
        if run.process.poll() is not None or time.monotonic() > deadline:
            raise StoryError(f"the run ended, or {_LIMIT:.0f} s passed, before {what}: {run.last_lines()}")
        time.sleep(0.05)


def _find_last_step(run: SftRun) -> int:
    """Return the step of a run's last checkpoint; 0: there is none."""
    return max((int(path.name.removeprefix("step-")) for path in run.checkpoints()), default=0)


def _find_line(run: SftRun, text: str) -> str:
    return next((line.strip() for line in run.log.read_text(errors="replace").splitlines() if text in line), "")


def _count_runs(folder: Path) -> int:
    return len(list((folder / "home" / "runs").glob("*")))


def _find_versions(client: dict[str, str], name: str) -> list[str]:
    """Ask the service's MLflow server for a model's versions."""
    script = (
        "import sys; from mlflow import MlflowClient; "
        "print(*[v.version for v in MlflowClient().search_model_versions(f\"name='{sys.argv[1]}'\")])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, name], env={**os.environ, **client}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def _need_gpu(capability: tuple[int, int], what: str) -> None:
    import torch

    if not _has_gpu() or torch.cuda.get_device_capability() < capability:
        raise LeftOutError(f"{what}: needs a GPU of compute capability {capability[0]}.{capability[1]}")


def _is_rank(process: psutil.Process) -> bool:
    """Say whether a process is one of a training's ranks: it was started by PyTorch's elastic launcher."""
    with suppress(psutil.Error):
        return "RANK" in process.environ() and "tasks.training.process.worker" in process.cmdline()
    return False


def _has_gpu() -> bool:
    return _count_gpus() > 0


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StoryError(otherwise)


if __name__ == "__main__":
    sys.exit(main())
