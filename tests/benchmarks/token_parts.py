"""What a rank fetches, writes and holds for the first steps of a training of a million examples, before and after.

    python -m tests.benchmarks.token_parts --rows 1000000 --steps 100

Tokens are drawn, in parts of 50,000 rows of 137 tokens on average, and lie in the tests' S3 server on loopback. One
process a way forms the batches of steps of 32 packs, without a model: `whole` fetches and lays out everything, as a
table of one window does; `parts` is what a large one does, alone and as one of 2 and of 8 ranks with a machine each.
The last line is a JSON object.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tests.object_store import serve_bucket

PART_ROWS = 50_000
_BUCKET = "tokens"
_VOCABULARY = 50_000
_WAYS = (("whole", 1), ("parts", 1), ("parts", 2), ("parts", 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", nargs=2, default=("", "1"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.work, options.way[0], int(options.way[1]), options.steps)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-parts-") as folder, serve_bucket(_BUCKET):
        stored_bytes = make_tokens(Path(folder) / "tokens", options.rows)
        figures = [run_way(Path(folder), *way, options.steps) for way in _WAYS]
    print(json.dumps({"rows": options.rows, "steps": options.steps, "stored_bytes": stored_bytes, "runs": figures}))


def make_tokens(tokens: Path, num_rows: int) -> int:
    """Write a tokens folder whose parts are in the bucket; return their bytes."""
    from tasks.partitions import name_part
    from tasks.stored_files import put_file, write_list
    from tasks.tokenization.token_index import index_part, name_index, write_index

    table, generator = tokens / "train.parquet", np.random.default_rng(0)
    table.mkdir(parents=True)
    listed, indices = {}, []
    for number, start in enumerate(range(0, num_rows, PART_ROWS)):
        count = min(PART_ROWS, num_rows - start)
        lengths = generator.integers(40, 235, count)
        ids = generator.integers(0, _VOCABULARY, int(lengths.sum()), dtype=np.int32)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
        lists = pa.LargeListArray.from_arrays(offsets, pa.array(ids))
        names = pa.array([f"{row:016x}" for row in range(start, start + count)], pa.large_string())
        part = name_part(table, number)
        columns = {"example_id": names, "input_ids": lists, "labels": lists}
        pq.write_table(pa.table(columns), part, row_group_size=10_000, compression="zstd", use_dictionary=False)
        indices.append(index_part(part))
        name = f"{table.name}/{part.name}"
        listed[name] = put_file(part, f"s3://{_BUCKET}/{name}", count)
        part.unlink()
    write_index(name_index(table), indices)
    write_list(tokens, listed)
    table.rmdir()
    return sum(file.num_bytes for file in listed.values())


def run_way(folder: Path, way: str, num_ranks: int, num_steps: int) -> dict[str, Any]:
    """Run one way in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.token_parts", "--work", str(folder), "--steps", str(num_steps)]
    done = subprocess.run([*command, "--way", way, str(num_ranks)], capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(figures, flush=True)
    return figures


def work(folder: Path, way: str, num_ranks: int, num_steps: int) -> dict[str, Any]:
    """Form the batches of the last of some ranks; return what it took."""
    from schemas.config import TrainingConfig
    from tasks.training.indexed_table import lay_out_index, open_indexed
    from tasks.training.micro_batches import form_flat_step, iterate_steps
    from tasks.training.rows import lay_out, open_rows

    config = TrainingConfig(micro_batch=4, gradient_accumulation_steps=8, packing=True, tokens_per_pack=16_384)
    tokens, place, fetched = folder / "tokens", folder / "run", 0
    address, used, disk_bytes = f"s3://{_BUCKET}", os.times(), 0
    if way == "whole":
        shutil.copytree(tokens, place / "tokens")
        fetched = fetch_all(place / "tokens", address)
        lay_out(place / "tokens" / "train.parquet", place / "laid", config)
        table, rows = open_rows(place / "laid")
    else:
        lay_out_index(tokens / "train.parquet", place / "laid", config, address)
        table, rows = open_indexed(tokens / "train.parquet", place / "laid", place / "parts", config, address)
    begin = time.perf_counter()
    steps = iterate_steps(
        table, rows, config, seed=0, first=0, last=num_steps, turn=(num_ranks - 1, num_ranks),
        form_step=lambda table, rows: form_flat_step(table, rows, 16_384),
    )  # fmt: skip
    for number, batches in enumerate(steps):
        del batches
        if number % 10 == 0:
            disk_bytes = max(disk_bytes, sum(file.stat().st_size for file in place.rglob("*") if file.is_file()))
    seconds, spent = time.perf_counter() - begin, os.times()
    counts = None if table.parts is None else table.parts.counts
    if table.parts is not None:
        table.parts.close()
    shutil.rmtree(place)
    own = Path("/proc/self/status").read_text(encoding="utf-8")
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", own)
    return {
        "way": way,
        "ranks": num_ranks,
        "num_parts": None if table.parts is None else len(table.parts),
        "used_parts": None if counts is None else len(counts.numbers),
        "fetched_bytes": fetched if counts is None else counts.fetched_bytes,
        "disk_bytes": disk_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "anonymous_bytes": int(anonymous[1]) * 1024 if anonymous else None,
        "waited_seconds": None if counts is None else round(counts.waited_seconds, 2),
        "step_seconds": round(seconds, 1),
        "cpu_seconds": round(sum(spent[:2]) - sum(used[:2]), 1),
    }


def fetch_all(tokens: Path, address: str) -> int:
    """Fetch all parts, as the run's machine does for a table of one window; return their bytes."""
    from tasks.stored_files import read_file, read_list

    listed = read_list(tokens)
    (tokens / "train.parquet").mkdir()
    for name, file in listed.items():
        (tokens / name).write_bytes(read_file(f"{address}/{name}", file))
    return sum(file.num_bytes for file in listed.values())


if __name__ == "__main__":
    main()
