"""What `sft plan` says of trainings beside what they took: time, memory; of those after the seventh it knows nothing.

    python -m tests.benchmarks.plan --work /tmp/bench          # on a GPU: real shapes with random weights, 7 minutes
    python -m tests.benchmarks.plan --work /tmp/bench --cpu    # the demo, by processor time

Each training is a process of its own. Then each is planned by the notes of the first seven without its own: of these
seven, six others; of those after them, all seven. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUM_KNOWN, NUM_HELD_OUT = 7, 100

_PACKS = {"packing": True, "micro_batch": 1}
# Name: shape, settings, most steps.
GPU: dict[str, tuple[str, dict[str, Any], int]] = {
    "0.6b, defaults": ("qwen3-0.6b", {}, 150),
    "0.6b, packs of 65,536": ("qwen3-0.6b", {**_PACKS, "tokens_per_pack": 65536, "gradient_checkpointing": False}, 12),
    "0.6b, micro batch 4": ("qwen3-0.6b", {"micro_batch": 4}, 200),
    "7b, defaults": ("qwen2.5-7b", {}, 30),
    "7b, packs of 32,768": ("qwen2.5-7b", {**_PACKS, "tokens_per_pack": 32768, "gradient_checkpointing": False}, 8),
    "7b, recomputed, 4 packs of 8,192": (
        "qwen2.5-7b",
        {**_PACKS, "tokens_per_pack": 8192, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
        7,
    ),
    "7b, rank 16, packs of 16,384": ("qwen2.5-7b", {**_PACKS, "rank": 16, "alpha": 32, "tokens_per_pack": 16384}, 12),
    "0.6b, rank 16, 2 packs of 16,384": (
        "qwen3-0.6b",
        {**_PACKS, "rank": 16, "alpha": 32, "tokens_per_pack": 16384, "gradient_accumulation_steps": 2},
        30,
    ),
    "7b, rank 32, micro batch 8": ("qwen2.5-7b", {"rank": 32, "alpha": 64, "micro_batch": 8}, 50),
    "7b, recomputed, packs of 16,384": (
        "qwen2.5-7b",
        {**_PACKS, "tokens_per_pack": 16384, "gradient_checkpointing": True},
        12,
    ),
    # Models that no size of the plan was chosen with.
    "1.7b, defaults": ("qwen3-1.7b", {}, 100),
    "olmo 3, packs of 16,384": (
        "olmo3-7b",
        {**_PACKS, "tokens_per_pack": 16384, "gradient_checkpointing": False},
        14,
    ),
    "8b, rank 8, micro batch 4": ("llama3-8b", {"rank": 8, "alpha": 16, "micro_batch": 4}, 80),
}
# Name: the model's width and tokens of the longest example (0: as they are), settings.
CPU: dict[str, tuple[int, int, dict[str, Any]]] = {
    "defaults, 1 epoch": (0, 0, {"num_epochs": 1}),
    "rank 8": (0, 0, {"rank": 8, "alpha": 16, "num_epochs": 1}),
    "micro batch 4": (0, 0, {"micro_batch": 4, "num_epochs": 0.5}),
    "packs of 512": (0, 0, {"packing": True, "tokens_per_pack": 512, "micro_batch": 2, "num_epochs": 1}),
    "at most 36 tokens": (0, 36, {"num_epochs": 1.5}),
    "width 384": (384, 0, {"num_epochs": 0.5}),
    "width 384, rank 16, micro batch 4": (384, 0, {"rank": 16, "alpha": 32, "micro_batch": 4, "num_epochs": 0.3}),
    "rank 32, 2 epochs": (0, 0, {"rank": 32, "alpha": 64, "num_epochs": 2}),
    "micro batch 8, recomputed": (0, 0, {"micro_batch": 8, "gradient_checkpointing": True, "num_epochs": 0.7}),
    "width 384, packs of 1,024": (
        384,
        0,
        {"packing": True, "tokens_per_pack": 1024, "micro_batch": 1, "num_epochs": 0.7},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sft-bench"), help="models, tokens and logs")
    parser.add_argument("--cpu", action="store_true", help="the demo on the CPU")
    parser.add_argument(
        "--only", type=int, nargs="*", help="numbers of trainings to do, from 0; others as noted before"
    )
    parser.add_argument("--limit", type=int, default=150, help="seconds a training may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work: Path = options.work / ("plan-cpu" if options.cpu else "plan-gpu")
    names = list(CPU if options.cpu else GPU)
    if options.one:
        train(options.one, options.work, work, is_cpu=options.cpu)
        return
    work.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        if options.only is None or number in options.only:
            prepare(name, options.work, work, is_cpu=options.cpu)
            call(number, name, options, work)
    os.environ["SFT_HOME"] = str(work / "home")
    report(names, options.work, work, is_cpu=options.cpu)


def call(number: int, name: str, options: argparse.Namespace, work: Path) -> None:
    """Do a training in a process of its own, with an empty folder for its notes."""
    shutil.rmtree(work / f"home-{number}", ignore_errors=True)
    words = ["-m", "tests.benchmarks.plan", "--work", str(options.work), "--one", name, *["--cpu"] * options.cpu]
    environment = {**os.environ, "SFT_HOME": str(work / f"home-{number}"), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with (work / f"{number}.log").open("wb") as log:
        try:
            code: int | str = subprocess.run(
                [sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                timeout=options.limit, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = "by its limit"
    lines = (work / f"{number}.log").read_text(errors="replace").splitlines()
    last = "" if code == 0 else f": {' | '.join(lines[-3:])}"
    print(f"{name}: ended {code} after {time.perf_counter() - started:.1f} s{last}", flush=True)


def find_folders(name: str, place: Path, work: Path, *, is_cpu: bool) -> tuple[Path, Path, dict[str, Any]]:
    """Return model, tokens and settings of a training."""
    if not is_cpu:
        shape, settings, steps = GPU[name]
        return place / shape / "model", work / f"tokens-{shape}", {**settings, "max_steps": steps}
    width, longest, settings = CPU[name]
    return work / f"model-{width}", work / f"tokens-{longest}", settings


def prepare(name: str, place: Path, work: Path, *, is_cpu: bool) -> None:
    """Make model and tokens, unless they are there."""
    model, tokens, _ = find_folders(name, place, work, is_cpu=is_cpu)
    if is_cpu:
        from tests.benchmarks import plan_inputs

        plan_inputs.make_demo_model(model, width=CPU[name][0])
        plan_inputs.make_demo_tokens(tokens, longest=CPU[name][1])
        return
    from tests.benchmarks.gpu import prepare as prepare_shape

    prepare_shape(model.parent, GPU[name][0])
    if not tokens.is_dir():
        import polars as pl

        tokens.mkdir()
        (tokens / "train.parquet").symlink_to((model.parent / "tokens" / "train.parquet").absolute())
        pl.read_parquet(tokens / "train.parquet").tail(NUM_HELD_OUT).write_parquet(tokens / "eval.parquet")


def train(name: str, place: Path, work: Path, *, is_cpu: bool) -> None:
    """Do a training, and have it noted."""
    if is_cpu:
        time.perf_counter = time.process_time  # others compute on this machine: their time is not the training's
        import tasks.training.loop  # noqa: F401  a run's process has its libraries before the training
    from schemas.config import TrainingConfig
    from tasks import storage
    from tasks.training.pace import PaceClock, count_tokens
    from tasks.training.process.launch import run_training
    from tasks.training.process.messages import TrainingJob

    model, tokens, settings = find_folders(name, place, work, is_cpu=is_cpu)
    config = TrainingConfig.model_validate(settings)
    with storage.new_folder() as folder:
        job = TrainingJob(model, tokens, folder / "run", config, 0, identity="plan")
        started = time.perf_counter()
        pace = PaceClock(saves_every=config.checkpoint_every_steps)
        outcome = run_training(job, on_step=pace.count, on_eval=pace.judge)
        pace.note(outcome, job, num_held_out=count_tokens(tokens / "eval.parquet"))
        seconds = time.perf_counter() - started
    taken = {"seconds": seconds, "num_steps": outcome.num_steps, "engine": outcome.engine}
    (storage.home() / "taken.json").write_text(json.dumps(taken))


def report(names: list[str], place: Path, work: Path, *, is_cpu: bool) -> None:
    """Plan each training, and print it beside what it took."""
    from tasks import speeds
    from tasks.training.pace import STEPS

    notes, taken = [], []
    for number, _ in enumerate(names):
        os.environ["SFT_HOME"] = str(work / f"home-{number}")
        notes.append(speeds.read_speeds())
        file = work / f"home-{number}" / "taken.json"
        taken.append(json.loads(file.read_text()) if file.is_file() else None)
    rows = []
    for number, name in enumerate(names):
        if (done := taken[number]) is None:
            continue
        others = [line for other in range(NUM_KNOWN) if other != number for line in notes[other]]
        (steps,) = [line for line in notes[number] if line.stage == STEPS]
        per_step = steps.seconds / steps.work["steps"]
        planned = plan(find_folders(name, place, work, is_cpu=is_cpu), others)
        took = {"steps": per_step * done["num_steps"], "all": done["seconds"], "memory": float(steps.peak_memory_bytes)}
        rows.append({"name": name, "is_known": number < NUM_KNOWN, "engine": done["engine"], **compare(planned, took)})
    print(f"{'planned (bar) taken ratio':34} {'steps, s':32} {'all, s':32} memory, GiB")
    for row in rows:
        cells = [write(row[what], 2**30 if what == "memory" else 1) for what in ("steps", "all", "memory")]
        print(f"{'' if row['is_known'] else '* '}{row['name']:34.34} " + " ".join(f"{cell:32}" for cell in cells))
    print("* unlike the trainings that the plan knows")
    print(json.dumps({"rows": rows}))


def plan(folders: tuple[Path, Path, dict[str, Any]], known: list[Any]) -> dict[str, Any]:
    """Return what the plan says, by these notes."""
    from schemas.config import TrainingConfig
    from tasks.planning.sizes import measure_sizes
    from tasks.planning.times import add_up
    from tasks.planning.trainings import plan_training

    model, tokens, settings = folders
    config = TrainingConfig.model_validate(settings)
    sizes = measure_sizes(tokens / "train.parquet", config)
    made = plan_training(model, tokens, config, seed=0, known=known, seen_tokens=sizes.seen_tokens)
    return {"steps": made.times[0].seconds, "all": add_up(made.times), "memory": made.peak_bytes}


def compare(planned: dict[str, Any], taken: dict[str, float]) -> dict[str, Any]:
    """Return what was planned beside what was taken."""
    return {
        what: {
            **({} if planned[what] is None else asdict(replace(planned[what]))),
            "taken": taken[what],
            "ratio": None if planned[what] is None else planned[what].value / taken[what],
        }
        for what in taken
    }


def write(cell: dict[str, Any], unit: int) -> str:
    """Return a cell of the table."""
    if cell["ratio"] is None:
        return f"unknown, {cell['taken'] / unit:.2f}"
    low, value, high, taken = (cell[name] / unit for name in ("low", "value", "high", "taken"))
    return f"{value:.2f} ({low:.2f} to {high:.2f}) {taken:.2f} {cell['ratio']:.3f}"


if __name__ == "__main__":
    main()
