"""The rows that every trainer of `gpu` trains on, what is told of it, and our own; `peers` has the others."""

import json
import logging
import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NUM_ROWS = 3000
_held: list[Any] = []


def draw_lengths() -> list[tuple[int, int]]:
    """Draw prompt and answer lengths: lognormal, medians 60 and 180, sigmas 0.8 and 0.9, 2,048 tokens together."""
    import numpy as np

    generator = np.random.default_rng(0)
    prompts = np.clip(generator.lognormal(math.log(60), 0.8, NUM_ROWS), 8, 1024).astype(int)
    answers = np.clip(generator.lognormal(math.log(180), 0.9, NUM_ROWS), 4, 1536).astype(int)
    return [(int(p), int(min(a, 2048 - p))) for p, a in zip(prompts, answers, strict=True)]


def draw_rows(vocabulary: int) -> list[dict[str, list[int]]]:
    """Give every row its ids, of the first 150,000 of a vocabulary, and the mask of its answer."""
    import numpy as np

    generator = np.random.default_rng(1)
    return [
        {
            "input_ids": generator.integers(10, min(150_000, vocabulary), p + a).tolist(),
            "completion_mask": [0] * p + [1] * a,
        }
        for p, a in draw_lengths()
    ]


def read_vocabulary(folder: Path) -> int:
    """Return the size of a shape's vocabulary."""
    size: int = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return size


def draw_pairs() -> list[dict[str, list[int]]]:
    """Give every row a second answer, of another row's length."""
    import numpy as np

    lengths = draw_lengths()
    generator = np.random.default_rng(2)
    others = generator.permutation([answer for _, answer in lengths]).tolist()
    return [
        {
            "prompt_ids": generator.integers(10, 150_000, prompt).tolist(),
            "chosen_ids": generator.integers(10, 150_000, answer).tolist(),
            "rejected_ids": generator.integers(10, 150_000, min(other, 2048 - prompt)).tolist(),
        }
        for (prompt, answer), other in zip(lengths, others, strict=True)
    ]


def write_pairs(folder: Path) -> Path:
    """Write the pairs as a tokens folder, unless it is there."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    if not (folder / "train.parquet").exists():
        folder.mkdir(exist_ok=True)
        kind = pa.list_(pa.int32())
        rows = draw_pairs()
        columns: dict[str, Any] = {"example_id": [f"row {number}" for number in range(len(rows))]}
        for name, ids, labels in (("chosen", "input_ids", "labels"), ("rejected", "rejected_ids", "rejected_labels")):
            answers = [row[f"{name}_ids"] for row in rows]
            pairs = list(zip((row["prompt_ids"] for row in rows), answers, strict=True))
            columns[ids] = pa.array([prompt + answer for prompt, answer in pairs], kind)
            columns[labels] = pa.array([[-100] * len(prompt) + answer for prompt, answer in pairs], kind)
        pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def write_long(folder: Path, num_tokens: int) -> Path:
    """Write a tokens folder of examples of so many tokens each, the first half untrained, unless it is there."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not (folder / "train.parquet").exists():
        folder.mkdir(exist_ok=True)
        generator, kind = np.random.default_rng(3), pa.list_(pa.int32())
        ids = [generator.integers(10, 100_000, num_tokens).tolist() for _ in range(4)]
        labels = [[-100] * (num_tokens // 2) + row[num_tokens // 2 :] for row in ids]
        names = [f"long {number}" for number in range(len(ids))]
        columns = {"example_id": names, "input_ids": pa.array(ids, kind), "labels": pa.array(labels, kind)}
        pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def hold_out(tokens: Path, folder: Path) -> Path:
    """Write a tokens folder with the same rows to train, and 64 of them held out, unless it is there."""
    import pyarrow.parquet as pq

    if not (folder / "eval.parquet").exists():
        folder.mkdir(exist_ok=True)
        shutil.copyfile(tokens / "train.parquet", folder / "train.parquet")
        pq.write_table(pq.read_table(tokens / "train.parquet").slice(0, 64), folder / "eval.parquet")
    return folder


def summarize(times: list[float], tokens: list[int], skip: int) -> dict[str, Any]:
    """Return the rate after the first `skip` steps, and the memory at its highest."""
    import torch

    seconds = times[-1] - times[skip - 1]
    return {
        "tokens_per_second": round(sum(tokens[skip:]) / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "tokens_per_step": round(sum(tokens[skip:]) / len(tokens[skip:])),
    }


class EnoughError(Exception):
    """All steps that are timed are done."""


def run_ours(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run the training stage's own functions: in this process, or in one for each GPU."""
    from schemas.config import TrainingConfig
    from tasks.training.process.launch import run_training
    from tasks.training.process.messages import TrainingJob

    times: list[float] = []
    records: list[Any] = []
    lines: list[str] = []
    warnings: list[str] = []

    def note(record: Any) -> None:
        times.append(time.perf_counter())
        records.append(record)
        print(record, flush=True)

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if record.levelno >= logging.WARNING:
                warnings.append(record.getMessage())

    logging.basicConfig(level=logging.INFO)
    logging.getLogger().addHandler(Lines())
    # A training of all weights is left before its end: what its last step writes, 90 GB for 7B, is not timed anyway.
    is_left = settings.get("method", "lora") != "lora"
    is_whole = settings.pop("whole", False)  # the stage is timed, with its start and the held-out losses
    long = settings.pop("long", 0)
    held_bytes = _hold_all_but(settings.pop("within_gib", 0.0))
    config = TrainingConfig(**settings, max_steps=steps + is_left, checkpoint_every_steps=10_000)
    run = folder / "run"
    if "RANK" not in os.environ:
        shutil.rmtree(run, ignore_errors=True)
    tokens = write_pairs(folder / "pairs") if config.is_paired else folder / "tokens"
    if long:
        tokens = write_long(folder / f"long-{long}", long)
    if is_whole or config.sweep.is_on:
        tokens = hold_out(tokens, folder / "held-out")
    job = TrainingJob(folder / "model", tokens, run, config, seed=0, identity="benchmark")
    started = time.perf_counter()
    peak_bytes = 0
    if "RANK" in os.environ:
        peak_bytes = _train_as_rank(job, note)
    elif is_left:
        _train_and_leave(job, note, steps)
    else:
        outcome = run_training(job, on_step=note, in_place=config.num_processes == 1)
        peak_bytes, warnings = outcome.peak_memory_bytes, list(outcome.warnings)
    stage_seconds = time.perf_counter() - started
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(run, ignore_errors=True)
    found = summarize(times, [record.num_tokens for record in records], max(2, steps // 4))
    if is_whole:
        found["tokens_per_second"] = round(sum(record.num_tokens for record in records) / stage_seconds)
    elif config.sweep.is_on:  # its held-out losses lie between the steps
        timed = records[max(2, steps // 4) :]
        seconds = sum(record.num_tokens / record.tokens_per_second for record in timed)
        found["tokens_per_second"] = round(sum(record.num_tokens for record in timed) / seconds)
    return {
        **found,
        "stage_seconds": round(stage_seconds, 1),
        "peak_gib": round((max(peak_bytes, *(record.memory_bytes for record in records)) - held_bytes) / 2**30, 1),
        "first_step_seconds": round(times[0] - started, 1),
        "final_loss": round(records[-1].loss, 3),
        "engine": next((line for line in lines if line.startswith("Training with")), ""),
        "warnings": warnings,
    }


def _hold_all_but(within_gib: float) -> int:
    """Hold the GPU's free memory up to so many GiB, for as long as this process lives; 0: hold nothing."""
    if not within_gib:
        return 0
    import torch

    free_bytes, _ = torch.cuda.mem_get_info()
    _held.append(torch.empty(int(free_bytes - within_gib * 2**30), dtype=torch.uint8, device="cuda"))
    return int(_held[0].numel())


def _train_as_rank(job: Any, note: Any) -> int:
    """Train as one of the ranks that a launcher has started."""
    from tasks.training.distributed import gather, init_process_group, rank
    from tasks.training.loop import train_adapter

    with init_process_group():
        if rank() == 0:
            shutil.rmtree(job.run_folder, ignore_errors=True)
        gather(None)
        outcome = train_adapter(
            job.base_model, job.tokens, job.run_folder, job.config, seed=job.seed, identity=job.identity, on_step=note
        )
    return outcome.peak_memory_bytes


def meet_other_ranks() -> None:
    """Wait until all ranks have come here: the launcher ends the others when one leaves."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _train_and_leave(job: Any, note: Any, steps: int) -> None:
    """Train in this thread, and leave after so many steps."""
    from tasks.training.loop import train_adapter

    def count(record: Any) -> None:
        note(record)
        if record.step == steps:
            raise EnoughError

    with suppress(EnoughError):
        train_adapter(
            job.base_model, job.tokens, job.run_folder, job.config, seed=job.seed, identity=job.identity, on_step=count
        )
