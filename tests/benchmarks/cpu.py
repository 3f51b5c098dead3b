"""LoRA training on a CPU, beside TRL's SFTTrainer, on the same model and rows.

    python tests/benchmarks/cpu.py [--shape demo 125m] [--rounds 3] [--cores 2]

Ours is the training stage's own entry with its defaults. TRL runs twice: with its defaults, and with the batch of ours,
no checkpointing and fp32. Rank, alpha and target modules are the same. Every turn is a process of its own, pinned to
the cores; the turns of a round follow each other, so that a ratio is of one round. Tokens are real ones, without
padding, and the first steps do not count. The last line is a JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DEMO = ROOT / "deploy" / "demo"
WANTED = 1.5
# Steps of a turn: those that do not count, and those that do.
SKIPPED = 3
STEPS = {"demo": 20, "125m": 4}
RANK, ALPHA = 64, 128
TURNS = ("ours", "trl", "trl-tuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sft-cpu"))
    parser.add_argument("--one", choices=TURNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, steps = options.work / options.shape[0], SKIPPED + STEPS[options.shape[0]]
        turn = run_ours(folder, steps) if options.one == "ours" else run_trl(folder, steps, options.one)
        print("RESULT", json.dumps(turn), flush=True)
        return
    shapes = {}
    for shape in options.shape:
        prepare(options.work / shape, shape)
        rounds: list[dict[str, float]] = []
        for number in range(options.rounds):
            rounds.append({who: call(who, shape, options) for who in TURNS})
            shown = ", ".join(f"{who} {rate:,.0f}" for who, rate in rounds[-1].items())
            print(f"{shape}, round {number + 1}, tokens a second: {shown}", flush=True)
        shapes[shape] = summarize(shape, rounds)
    print(json.dumps({"cores": options.cores, "load": os.getloadavg(), "shapes": shapes}))


def summarize(shape: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Print and return the ratios, round by round: the median and the extremes."""
    summary: dict[str, Any] = {"tokens_per_second": rounds}
    for peer in TURNS[1:]:
        ratios = [turn["ours"] / turn[peer] for turn in rounds]
        summary[f"to_{peer}"] = {
            "median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2), "max": round(max(ratios), 2),
        }  # fmt: skip
        wanted = f" (wanted {WANTED:g})" if peer == "trl" else ""
        print(f"{shape}: {statistics.median(ratios):.2f} x {peer}{wanted}")
    return summary


def prepare(folder: Path, shape: str) -> None:
    """Write the model and the demo's rows as a tokens folder."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tasks.tokenization.masking import build_examples
    from tasks.tokenization.templates import prepare_tokenizer

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DEMO / "base_model", folder / "model")
    prepared = prepare_tokenizer(folder / "model", None).tokenizer
    prepared.save_pretrained(folder / "model")
    if shape != "demo":
        config = AutoConfig.from_pretrained(folder / "model")
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        config.update({**sizes, "num_key_value_heads": 12, "head_dim": 64, "layer_types": ["full_attention"] * 12})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    for line in (DEMO / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            question = f"{row['instruction']}\n{row['input']}".strip()
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            examples = build_examples(turns, prepared)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # five rows of the demo are broken on purpose
        ids.extend(example.input_ids for example in examples)
        labels.extend(example.labels for example in examples)
    (folder / "tokens").mkdir()
    lists = pa.list_(pa.int32())
    columns = {
        "example_id": [f"row {number}" for number in range(len(ids))],
        "input_ids": pa.array(ids, lists),
        "labels": pa.array(labels, lists),
    }
    pq.write_table(pa.table(columns), folder / "tokens" / "train.parquet")


def call(who: str, shape: str, options: argparse.Namespace) -> float:
    """Do one turn in a process of its own; return its tokens a second."""
    command = [sys.executable, __file__, "--one", who, "--shape", shape, "--work", str(options.work)]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(options.cores),
    }  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{who} failed:\n{run.stdout[-1000:]}{run.stderr[-3000:]}")
    rate: float = json.loads(lines[-1][7:])
    return rate


def run_ours(folder: Path, steps: int) -> float:
    """Run the training stage's entry."""
    from schemas.config import TrainingConfig
    from tasks.training.process.launch import run_training
    from tasks.training.process.messages import TrainingJob

    records: list[Any] = []
    times: list[float] = []

    def note(record: Any) -> None:
        times.append(time.perf_counter())
        records.append(record)

    config = TrainingConfig(rank=RANK, alpha=ALPHA, max_steps=steps, num_epochs=100, checkpoint_every_steps=10_000)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run_training(TrainingJob(folder / "model", folder / "tokens", run, config, 0, "benchmark"), on_step=note)
    return sum(record.num_tokens for record in records[SKIPPED:]) / (times[-1] - times[SKIPPED - 1])


def run_trl(folder: Path, steps: int, who: str) -> float:
    """Run TRL with its defaults, or with ours where it has the same setting."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    table = pq.read_table(folder / "tokens" / "train.parquet").to_pydict()
    rows = [
        {"input_ids": ids, "completion_mask": [int(label != -100) for label in labels]}
        for ids, labels in zip(table["input_ids"], table["labels"], strict=True)
    ]
    tuned: dict[str, Any] = {}
    if who == "trl-tuned":
        tuned = {"per_device_train_batch_size": 16, "gradient_checkpointing": False, "bf16": False}
    config = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=steps, report_to="none", save_strategy="no", use_cpu=True, **tuned
    )
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list(rows), peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    times: list[float] = []
    tokens: list[int] = []
    counts = [0]
    inner = trainer.training_step

    def counting_step(model: Any, inputs: dict[str, Any], *rest: Any, **further: Any) -> Any:
        counts[0] += int((inputs["attention_mask"] != 0).sum())
        return inner(model, inputs, *rest, **further)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **further: Any) -> None:
            times.append(time.perf_counter())
            tokens.append(counts[0])
            counts[0] = 0

    trainer.training_step = counting_step
    trainer.add_callback(Clock())
    trainer.train()
    return sum(tokens[SKIPPED:]) / (times[-1] - times[SKIPPED - 1])


if __name__ == "__main__":
    main()
