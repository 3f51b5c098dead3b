"""The way from a file of rows to packed rows on disk, against the tokenizer alone and against TRL's preparation.

    python -m tests.benchmarks.data                      40,000 rows, interleaved rounds, all three
    python -m tests.benchmarks.data --rows 1000000       time and memory against a tenth of the rows, without TRL

The last line is a JSON object. Ratios are of the same run and the same round; absolute figures are of the machine.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import count, islice
from pathlib import Path
from typing import Any

import psutil

from tasks import execution

ROOT = Path(__file__).resolve().parents[2]
MATERIAL = ROOT.parent / "shared" / "material"
TOKENS_PER_PACK = 2048
# TRL logs, downloads nothing, and takes as many processes as cores were meant for the job.
TRL_SCRIPT = """
import json, sys, time
from datasets import load_dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer
rows, tokenizer, folder, length = sys.argv[1:]
processing = AutoTokenizer.from_pretrained(tokenizer)
config = Qwen2Config(vocab_size=len(processing), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=1, num_key_value_heads=1)
model = Qwen2ForCausalLM(config)
arguments = SFTConfig(output_dir=folder, max_length=int(length), packing=True, packing_strategy="bfd",
                      assistant_only_loss=False, dataset_num_proc=2, report_to="none", use_cpu=True, bf16=False)
begin = time.perf_counter()
data = load_dataset("json", data_files=rows, split="train", cache_dir=folder)
trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=processing)
print(json.dumps({"seconds": time.perf_counter() - begin, "packs": len(trainer.train_dataset)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=MATERIAL / "tokenizers" / "qwen2.5-instruct")
    parser.add_argument("--texts", type=Path, default=MATERIAL / "datasets" / "gpteacher")
    parser.add_argument("--peer", choices=["trl", "none"], default="trl")
    options = parser.parse_args()
    execution.call(os.getpid)  # imports are not timed, ours as little as TRL's
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        os.environ["SFT_HOME"] = str(Path(folder) / "home")
        large = options.rows > 100_000
        result = measure_size(options, Path(folder)) if large else measure_speed(options, Path(folder))
    print(json.dumps({**result, "rows": options.rows, **describe_machine()}))


def measure_speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time the tokenizer alone, our whole way and TRL's in turn, several rounds."""
    source = write_rows(folder / "rows.jsonl", options.texts, options.rows)
    texts, characters = render_texts(source, options.tokenizer)
    figures: dict[str, list[float]] = {}
    for number in range(options.rounds):
        seconds = {"encode_batch_fast": time_encoding(texts, options.tokenizer), **time_ours(source, options, folder)}
        if options.peer == "trl":
            seconds["trl"] = time_trl(source, options.tokenizer, folder)
        for name, value in seconds.items():
            figures.setdefault(name, []).append(value)
        shown = ", ".join(f"{name} {options.rows / value:,.0f}" for name, value in seconds.items())
        print(f"round {number + 1}, rows a second: {shown}", flush=True)
    print_table(figures, options.rows)
    ours = figures["ours"]
    ratios = {"to_encode_batch_fast": compare(figures["encode_batch_fast"], ours)}
    if "trl" in figures:
        ratios["to_trl"] = compare(figures["trl"], ours)
    return {
        "ratios": ratios,
        "seconds": {name: [round(value, 3) for value in values] for name, values in figures.items()},
        "characters_per_row": round(characters, 1),
    }


def compare(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Return how many times faster ours is, round by round: the median and the extremes."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def measure_size(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time a tenth of the rows and all of them, and watch the memory of every process."""
    sizes = {}
    for rows in (options.rows // 10, options.rows):
        source = write_rows(folder / f"{rows}.jsonl", options.texts, rows)
        used = count_cpu_seconds()
        with watch_memory() as peaks:
            seconds = time_ours(source, options, folder)
        rate, used = rows / seconds["ours"], count_cpu_seconds() - used
        sizes[rows] = {"rows_per_second": round(rate, 1), "cpu_seconds": round(used, 1), "seconds": seconds, **peaks}
        print(f"{rows:,} rows: {rows / seconds['ours']:,.0f} a second, {peaks}", flush=True)
        source.unlink()
    small, large = (size["rows_per_second"] for size in sizes.values())
    small_cpu, large_cpu = (size["cpu_seconds"] / rows for rows, size in sizes.items())
    ratios = {"linearity": round(large / small, 3), "linearity_of_cpu_seconds": round(small_cpu / large_cpu, 3)}
    return {"sizes": sizes, **ratios}


def count_cpu_seconds() -> float:
    """Return what this process and its workers have used so far; unlike time, it hardly depends on the load."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def write_rows(path: Path, texts: Path, num_rows: int) -> Path:
    """Write conversations of about 460 characters, no two alike, from a folder of instruction rows."""
    rows = [row for file in sorted(texts.glob("*.json")) for row in json.loads(file.read_text(encoding="utf-8"))]
    questions = [f"{row['instruction']}\n{row.get('input') or ''}".strip() for row in rows]
    answers = [row["response"].strip() for row in rows if row["response"].strip()]
    with path.open("w", encoding="utf-8") as file:
        for number in islice(count(), num_rows):
            turn, place = divmod(number, len(questions))
            question, answer = questions[place], answers[(7 * number + 13 * turn) % len(answers)]
            asked = f"{question} ({turn})" if turn else question
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def render_texts(source: Path, tokenizer_folder: Path) -> tuple[list[str], float]:
    """Return the rendered conversations, and the mean number of characters in the contents of a row."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    texts, characters = [], 0
    with source.open(encoding="utf-8") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            characters += sum(len(message["content"]) for message in messages)
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    return texts, characters / len(texts)


def time_encoding(texts: list[str], tokenizer_folder: Path) -> float:
    """Time the tokenizers library alone, on all cores, in a process of its own kind: a fresh tokenizer."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    begin = time.perf_counter()
    tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - begin


def time_ours(source: Path, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Time the whole way, from the file to a digest of packed rows, by its stages."""
    from schemas.config import DataConfig, TokenizationConfig
    from tasks import storage
    from tasks.ingestion.dataset import build_dataset
    from tasks.tokenization.examples import tokenize_dataset
    from tasks.tokenization.templates import prepare_tokenizer
    from tasks.training.table_writer import write_examples, write_packs
    from tasks.training.token_table import open_packs

    home = Path(tempfile.mkdtemp(dir=folder))
    prepared = prepare_tokenizer(options.tokenizer, None)
    stamps = [time.perf_counter()]
    data = DataConfig(source=str(source), eval_fraction=0.01)
    counts = build_dataset(data, seed=0, folder=home / "dataset")
    storage.digest_folder(home / "dataset")
    stamps.append(time.perf_counter())
    config = TokenizationConfig(max_truncated_fraction=1.0)
    tokens = tokenize_dataset(home / "dataset", prepared, home / "tokens", config)
    storage.digest_folder(home / "tokens")
    stamps.append(time.perf_counter())
    write_examples(home / "tokens" / "train.parquet", home / "packs")
    write_packs(home / "packs", TOKENS_PER_PACK)
    stamps.append(time.perf_counter())
    assert counts.rows_train == tokens.rows_train + sum(tokens.rows_rejected.values())
    assert sum(map(len, open_packs(home / "packs"))) == tokens.num_examples
    shutil.rmtree(home)
    names = ("ingestion", "tokenization", "packing")
    seconds = {name: stop - start for name, start, stop in zip(names, stamps, stamps[1:], strict=False)}
    return {"ours": stamps[-1] - stamps[0], **seconds}


def time_trl(source: Path, tokenizer_folder: Path, folder: Path) -> float:
    """Time TRL's preparation (loading the rows, template, tokens, packing) in a process of its own."""
    home = tempfile.mkdtemp(dir=folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": home}
    command = [sys.executable, "-c", TRL_SCRIPT, str(source), str(tokenizer_folder), home, str(TOKENS_PER_PACK)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"TRL failed (make bench-data installs it):\n{run.stderr[-3000:]}")
    shutil.rmtree(home)
    seconds: float = json.loads(run.stdout.splitlines()[-1])["seconds"]
    return seconds


@contextmanager
def watch_memory() -> Iterator[dict[str, int]]:
    """Note the largest resident memory of this process, of any of its children, and of all together.

    Together, a page that processes share counts once (its proportional set size).
    """
    peaks = {"peak_rss_main_bytes": 0, "peak_rss_child_bytes": 0, "peak_pss_all_bytes": 0}
    done = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not done.wait(0.5):
            sizes, shares = [0], 0
            for process in (me, *me.children(recursive=True)):
                try:
                    memory = process.memory_full_info()
                except psutil.Error:
                    continue
                sizes.append(memory.rss)
                shares += memory.pss
            for name, size in zip(peaks, (sizes[1], max(sizes[2:], default=0), shares), strict=True):
                peaks[name] = max(peaks[name], size)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def print_table(figures: dict[str, list[float]], num_rows: int) -> None:
    """Print the median, fastest and slowest round of each way."""
    print(f"{'':20}{'rows/s':>10}{'median s':>10}{'min s':>8}{'max s':>8}")
    for name, values in figures.items():
        median = statistics.median(values)
        print(f"{name:20}{num_rows / median:>10,.0f}{median:>10.2f}{min(values):>8.2f}{max(values):>8.2f}")


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    versions = {}
    for name in ("tokenizers", "transformers", "polars", "pyarrow", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "cpu": platform.processor() or platform.machine(),
        "load": os.getloadavg(),
        "versions": versions,
    }


if __name__ == "__main__":
    main()
