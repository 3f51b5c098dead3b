"""Training speed and memory on a GPU, beside other trainers, on the same rows and model shapes.

    python tests/benchmarks/gpu.py --work /tmp/bench [--only NAME …] [--peer unsloth=PATH …]

Every row of the table is a process of its own, one after the other. Models have random weights in real shapes: speed
does not depend on the values. Tokens are real ones, without padding; a rate is taken after the first steps. A peer runs
with PATH first on its PYTHONPATH (a `pip install --target` folder), or with what is installed here. The last line is
one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import peers, trainers  # noqa: E402 (the file is run by its path, also by peers' interpreters)
from tests.benchmarks.gpu_runs import RUNS, TABLE  # noqa: E402
from tests.benchmarks.random_weights import UNSAVED, load_at_random, save_model, save_tokenizer  # noqa: E402
from tests.benchmarks.shapes import SHAPES  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sft-bench"), help="models and logs")
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="runs to do")
    parser.add_argument(
        "--peer", nargs="*", action="extend", default=[], help="NAME=PATH, first on the peer's PYTHONPATH"
    )
    parser.add_argument("--limit", type=int, default=240, help="seconds a run may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, shape, settings, steps = RUNS[options.one]
        if shape in UNSAVED:
            # The fused engine reads a divided model layer by layer; others hold it whole before they divide it.
            is_fused = who == "ours" and settings.get("engine") != "general"
            load_at_random(by_layer=is_fused and settings.get("strategy") == "fsdp")
        result = getattr(trainers if who == "ours" else peers, f"run_{who}")(options.work / shape, settings, steps)
        if os.environ.get("RANK", "0") == "0":
            print("RESULT", json.dumps(result), flush=True)
        trainers.meet_other_ranks()
        os._exit(0)  # some trainers hang in their own endings
    paths = dict(entry.split("=", 1) for entry in options.peer)
    for shape in sorted({RUNS[name][1] for name in options.only}):
        prepare(options.work / shape, shape)
    names = [name for name in options.only if RUNS[name][2].get("num_processes", 1) <= max(1, count_gpus())]
    results = {name: call(name, options.work, paths.get(RUNS[name][0]), options.limit) for name in names}
    report(results)


def count_gpus() -> int:
    """Return how many GPUs there are."""
    import torch

    return torch.cuda.device_count()


def prepare(folder: Path, shape: str) -> None:
    """Save a model with random weights, and the rows as a tokens folder, unless they are there."""
    if (folder / "done").exists():
        return
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    import torch
    from transformers import AutoConfig

    settings = dict(SHAPES[shape])
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(
        settings.pop("model_type"), **settings, max_position_embeddings=32768, dtype="bfloat16", **special
    )
    save_model(config, folder / "model", shape)
    save_tokenizer(folder / "model")
    rows = trainers.draw_rows(SHAPES[shape]["vocab_size"])
    (folder / "tokens").mkdir()
    lists = pa.list_(pa.int32())
    labels = [
        [i if trained else -100 for i, trained in zip(row["input_ids"], row["completion_mask"], strict=True)]
        for row in rows
    ]
    columns = {
        "example_id": [f"row {number}" for number in range(len(rows))],
        "input_ids": pa.array([row["input_ids"] for row in rows], lists),
        "labels": pa.array(labels, lists),
    }
    pq.write_table(pa.table(columns), folder / "tokens" / "train.parquet")
    (folder / "done").touch()
    torch.cuda.empty_cache()


def call(name: str, work: Path, path: str | None, limit: int) -> dict[str, Any]:
    """Do a run in a process of its own; its output goes to a log."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if RUNS[name][0] != "ours":  # ours has what the product sets itself, as for its users
        environment |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "UNSLOTH_DISABLE_STATISTICS": "1"}
    elif RUNS[name][2].get("method", "lora") != "lora":  # not in a process of the product's: see `trainers.run_ours`
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    inherited = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(ROOT), None if path else inherited]))
    log = work / f"{name}.log"
    started = time.perf_counter()
    launcher: list[str] = []
    who, shape, settings, _ = RUNS[name]
    if settings.get("num_processes", 1) > 1 and (who != "ours" or shape in UNSAVED):  # the product starts its own
        number = settings["num_processes"]
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the product's processes
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    with log.open("wb") as output, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, *launcher, __file__, "--work", str(work), "--one", name],
            env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit, check=False,
        )  # fmt: skip
    seconds = round(time.perf_counter() - started, 1)
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith("RESULT ")]
    result: dict[str, Any] = json.loads(found[-1][7:]) if found else {"error": " | ".join(lines[-6:])[-600:]}
    print(f"{name}: {json.dumps({**result, 'process_seconds': seconds})}", flush=True)
    return result


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print the table, and the JSON object as the last line."""
    rows = []
    for what, ours, peer, wanted, most in TABLE:
        mine, other = results.get(ours, {}), results.get(peer, {})
        if "tokens_per_second" not in mine:
            continue
        ratio = mine["tokens_per_second"] / other["tokens_per_second"] if "tokens_per_second" in other else None
        met = ratio is not None and ratio >= wanted and (most is None or mine["peak_gib"] <= most)
        rows.append(
            {"what": what, "ours": mine, "peer": peer, "against": other, "ratio": ratio, "wanted": wanted, "met": met}
        )
        shown = f"{ratio:.2f} x (wanted {wanted:g})" if ratio is not None else "peer not measured"
        print(
            f"{what:45s} {mine['tokens_per_second']:>9,.0f} tok/s {mine['peak_gib']:6.1f} GiB   "
            f"{peer:24s} {other.get('tokens_per_second', float('nan')):>9,.0f} tok/s   {shown}"
        )
    report_first_steps(results)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(json.dumps({"device": device, "torch": torch.__version__, "runs": results, "table": rows}))


def report_first_steps(results: dict[str, dict[str, Any]]) -> None:
    """Print how long a 7B training takes to its first step: the first one compiles, where anything has to be."""
    names = [name for name in results if name.startswith("ours-7b") and "first_step_seconds" in results[name]]
    seconds = [results[name]["first_step_seconds"] for name in names]
    for what, values, wanted in (("the first time", seconds[:1], 60.0), ("after that", seconds[1:], 25.0)):
        if values:
            print(f"7B, first step, {what}: at most {max(values):.1f} s after the call (wanted {wanted:g})")


if __name__ == "__main__":
    main()
