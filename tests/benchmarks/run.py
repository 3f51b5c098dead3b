"""The whole job: raw rows to a registered merged model through `sft run` itself, beside a peer's whole job.

    python -m tests.benchmarks.run --work /tmp/job [--peer trl=PATH] [--config FILE] [--data FILE …] [--model FOLDER]

Without options: a Qwen3-0.6B of random weights, made rows of realistic lengths, one epoch, otherwise the defaults.
`sft run` runs twice, each time in a fresh home: the second time with another seed, and with whatever the first one
compiled. Nothing is set for it in the environment. The peer trains the same LoRA adapter on the same rows with the same
number of epochs and examples a step, and answers the same held-out rows before and after; PATH comes first on its
PYTHONPATH. When its batch does not fit, it accumulates smaller ones. A config's own model and data are taken where none
are given here. Prints a table of seconds; the last line is one JSON object. Exit code 1: one of our runs failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from schemas.config import RunConfig
from schemas.loading import parse_config
from tasks.models import read_context_length
from tests.benchmarks import inputs
from tests.benchmarks.sft_run import ROOT, end_with_this_process, start_run

_STAGES = {
    "start, imports, loading": (("start",), ("start",)),
    "rows to tokens": (("locate", "ingest", "tokenize"), ("tokenize",)),
    "held-out answers before": (("evaluate_base",), ("answers_before",)),
    "training": (("train",), ("train",)),
    "merge, proof, saving": (("merge",), ("merge",)),
    "held-out answers after": (("evaluate_merged", "evaluate_champion"), ("answers_after",)),
    "comparison, registration": (("compare", "register"), ()),
    "whole": (("whole",), ("whole",)),
}
Result = dict[str, Any]


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sft-bench-run"), help="model, rows, homes and logs")
    parser.add_argument("--config", type=Path, help="settings of the run, a YAML file")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="JSON or JSONL files of rows, or folders")
    parser.add_argument("--model", type=Path, help="folder of the base model")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer of a made model")
    parser.add_argument("--rows", type=int, help="at most so many rows; how many are made")
    parser.add_argument("--epochs", type=float, help="1 without a config")
    parser.add_argument("--runs", type=int, default=2, help="of ours")
    parser.add_argument("--peer", nargs="*", default=[], help="trl=PATH, first on the peer's PYTHONPATH; trl= for none")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a run may take")
    options = parser.parse_args()
    end_with_this_process()
    options.work.mkdir(parents=True, exist_ok=True)
    config = prepare(options)
    results: dict[str, Result] = {}
    for number in range(1, options.runs + 1):
        name = f"ours, run {number}"
        results[name] = _tell(name, run_ours(config, options.work / f"ours-{number}", number - 1, options.limit))
    for peer in options.peer:
        who, _, path = peer.partition("=")
        if who != "trl":
            parser.error(f"--peer {peer}: only trl is known")
        results[who] = _tell(who, run_trl(config, options.work / who, path, options.limit))
    report(config, results)
    return int(any("error" in result for name, result in results.items() if name.startswith("ours")))


def prepare(options: argparse.Namespace) -> RunConfig:
    """Make or read model and rows, write the rows as files, and return the whole config."""
    import torch

    on_gpu = torch.cuda.is_available()
    values: dict[str, Any] = yaml.safe_load(options.config.read_text()) if options.config else {"name": "bench"}
    own_model, own_data = values.get("model", {}).get("base_model"), values.get("data", {}).get("source")
    folder = options.model or (Path(own_model) if own_model else None)
    made = "qwen3-0.6b" if on_gpu else "tiny"
    folder = folder or inputs.make_model(options.work / made, made, options.tokenizer)
    data = options.data or ([Path(own_data)] if own_data else [])
    if data:
        rows = inputs.read_rows(data, options.rows)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        length = read_context_length(folder) or 2048
        rows = inputs.make_rows(options.rows or (14_000 if on_gpu else 200), tokenizer, min(2048, length))
    settings = parse_config({**values, "model": {"base_model": str(folder)}, "data": {"source": "rows"}})
    num_held_out = max(1, min(settings.evaluation.max_examples, len(rows) // 5))
    train, held_out = inputs.write_rows(rows, options.work / "rows", num_held_out)
    print(f"{len(rows) - num_held_out} rows to train, {num_held_out} held out; model {folder}", flush=True)
    given = {name: value for name, value in values.get("data", {}).items() if name == "max_rejected_fraction"}
    values |= {
        "model": {**values.get("model", {}), "base_model": str(folder.absolute())},
        "data": {**given, "source": str(train.absolute()), "eval_source": str(held_out.absolute())},
    }
    if options.epochs or not options.config:
        values["training"] = {**values.get("training", {}), "num_epochs": options.epochs or 1.0}
    return parse_config(values)


def run_ours(config: RunConfig, folder: Path, seed: int, limit: float) -> Result:
    """Run the pipeline in a fresh home, and return its seconds by stage and the training's rates."""
    shutil.rmtree(folder, ignore_errors=True)
    values = config.model_copy(update={"seed": config.seed + seed}).model_dump(mode="json")
    try:
        found = start_run(values, folder).wait(limit)
    except RuntimeError as error:
        return {"error": str(error), "log": str(folder / "run.log")}
    seconds = {**found["durations_seconds"]}
    seconds["whole"] = found["whole_seconds"]
    seconds["start"] = round(seconds["whole"] - sum(found["durations_seconds"].values()), 1)
    num_tokens = _count_tokens(config, found)
    shutil.rmtree(folder / "home", ignore_errors=True)
    return {
        "seconds": seconds,
        "steps": found["training"]["steps"],
        "tokens_per_second_in_training": round(found["training"]["tokens_per_second"]),
        "tokens_per_second_of_stage": round(num_tokens / seconds["train"]),
        "peak_gib": round(found["training"]["peak_memory_bytes"] / 2**30, 1),
        "examples": found["tokens"]["examples"],
        "version": f"{found['registry']['name']}/{found['registry']['version']}",
        "verdict": found["registry"]["verdict"],
    }


def _count_tokens(config: RunConfig, found: Result) -> float:
    """Return the tokens that the training saw: those of its epochs, or of as many steps as were allowed."""
    examples = found["tokens"]["examples"]
    batch = config.training.rows_per_step
    epochs = config.training.num_epochs
    if config.training.max_steps is not None and not config.training.packing:
        epochs = min(epochs, config.training.max_steps * batch / examples)
    return float(found["tokens"]["total_tokens"] * epochs)


def run_trl(config: RunConfig, folder: Path, path: str, limit: float) -> Result:
    """Run TRL's whole job in a process of its own; smaller batches, when one does not fit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    training = config.training
    batch = training.rows_per_step
    micro, result = training.micro_batch, Result()
    while micro >= 1:
        job = {
            "model": config.model.base_model, "train": config.data.source, "held_out": config.data.eval_source,
            "output": str(folder / "merged"), "micro_batch": micro, "accumulation": batch // micro,
            "num_epochs": training.num_epochs, "max_steps": training.max_steps, "rank": training.rank,
            "alpha": training.alpha, "dropout": training.dropout, "learning_rate": training.learning_rate,
            "max_length": config.tokenization.max_length, "num_answers": config.evaluation.max_examples,
            "max_new_tokens": config.evaluation.max_new_tokens, "seed": config.seed,
            "processes": min(8, os.cpu_count() or 1),
        }  # fmt: skip
        (folder / "job.json").write_text(json.dumps(job))
        result = _call_peer(folder, path, limit)
        if "out of memory" not in result.get("error", "").lower():
            break
        print(f"trl: {micro} examples at once do not fit; half as many", flush=True)
        micro //= 2
    return {**result, "micro_batch": micro}


def _call_peer(folder: Path, path: str, limit: float) -> Result:
    """Start the script, wait, and return what it said."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or not path}
    environment = {
        **kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }  # fmt: skip
    if path:
        environment["PYTHONPATH"] = path
    log = folder / "job.log"
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "trl_job.py"), str(folder / "job.json")]
    began = time.perf_counter()
    with log.open("wb") as output:
        try:
            subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            output.write(b"\nno end within the limit\n")
    whole = round(time.perf_counter() - began, 1)
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith("RESULT ")]
    if not found:
        wrong = [line for line in lines if "out of memory" in line.lower()][:1]
        return {"error": " | ".join([*wrong, *lines[-8:]])[-1500:], "log": str(log)}
    result: Result = json.loads(found[-1][7:])
    seconds = result["seconds"]
    seconds["whole"] = whole
    # The interpreter's start and end belong to the job.
    seconds["start"] = round(seconds["start"] + whole - sum(seconds[name] for name in seconds if name != "whole"), 1)
    return {**result, "tokens_per_second_of_stage": round(result["num_tokens"] / seconds["train"])}


def _tell(name: str, result: Result) -> Result:
    print(f"{name}: {json.dumps(result)}", flush=True)
    return result


def report(config: RunConfig, results: dict[str, Result]) -> None:
    """Print the table of seconds, the ratios, and the JSON object as the last line."""
    done = {name: result for name, result in results.items() if "seconds" in result}
    print(f"\n{'seconds':28s}" + "".join(f"{name:>16s}" for name in done))
    for stage, keys in _STAGES.items():
        line = f"{stage:28s}"
        for name, result in done.items():
            parts = [result["seconds"][key] for key in keys[0 if name.startswith("ours") else 1]
                     if key in result["seconds"]]  # fmt: skip
            line += f"{sum(parts):16.1f}" if parts else f"{'':>16s}"
        print(line)
    for title, key in (
        ("tok/s of the training stage", "tokens_per_second_of_stage"),
        ("tok/s, the loop's own", "tokens_per_second_in_training"),
        ("steps", "steps"),
        ("peak GiB", "peak_gib"),
    ):
        values = (f"{result[key]:16,.0f}" if result.get(key) is not None else " " * 16 for result in done.values())
        print(f"{title:28s}" + "".join(values))
    ratios = {
        f"{peer} / {ours}": round(done[peer]["seconds"]["whole"] / done[ours]["seconds"]["whole"], 2)
        for peer in done
        for ours in done
        if ours.startswith("ours") and not peer.startswith("ours")
    }
    for name, ratio in ratios.items():
        print(f"whole job, {name}: {ratio:.2f} x")
    for name in results.keys() - done.keys():
        print(f"{name} failed: {results[name]['error']}")
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {"device": device, "torch": torch.__version__, "config": config.model_dump(mode="json")}
    print(json.dumps({**facts, "runs": results, "ratios": ratios}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
