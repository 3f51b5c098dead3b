"""Rows from a bucket to tokens in a bucket: the local pool's time, beside that of a Ray cluster of two machines.

    python -m tests.benchmarks.cluster --rows 1000000               rounds of both ways in turn
    python -m tests.benchmarks.cluster --rows 1000000 --lose        and one in which a worker and a machine are killed
    python -m tests.benchmarks.cluster --rows 10000000 --ways ray --rounds 1     the head's memory

The machines of the cluster are processes of this one, with a core each; the store is the tests' (moto). Time is that of
the run's process from its first line of work: connecting to the cluster and starting workers are in it, the cluster's
own start is not. Processor seconds are those of the run, its workers and the cluster; the store's are told apart. The
last line is a JSON object.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.data import MATERIAL, ROOT, describe_machine, write_rows
from tests.object_store import Traffic, serve_bucket
from tests.tasks.cluster_nodes import Nodes, start_nodes

BUCKET = "rows"
ROWS_PER_FILE = 50_000
_CORES = 2
_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-with-32-letters"}
_SOON = {"RAY_health_check_period_ms": "1000"}
_WATCH_SECONDS = 0.25
_KINDS = rf"([A-Z]+) /{BUCKET}/?(in|out/\w+|)"
"""Requests are counted by method and folder; those without a folder list names."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=["local", "ray"], default=["local", "ray"])
    parser.add_argument("--lose", action="store_true", help="kill a worker and a machine in one more round")
    parser.add_argument("--tokenizer", type=Path, default=MATERIAL / "tokenizers" / "qwen2.5-instruct")
    parser.add_argument("--texts", type=Path, default=MATERIAL / "datasets" / "gpteacher")
    parser.add_argument("--short", action="store_true", help="rows of 60 bytes, of which many are made soon")
    parser.add_argument("--ingest-only", action="store_true", help="without tokens and upload")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options)), flush=True)
        sys.stdin.readline()  # until the processor time of the workers is read
        return
    traffic = Traffic(_KINDS)
    with tempfile.TemporaryDirectory(prefix="bench-cluster-") as folder, serve_bucket(BUCKET, traffic.watch) as client:
        fill_bucket(client, Path(folder), options)
        figures: list[dict[str, Any]] = []
        for number in range(options.rounds):
            for way in options.ways[:: 1 if number % 2 == 0 else -1]:
                figures.append(measure(way, Path(folder), options, traffic))
        if options.lose:
            figures.append(measure("ray", Path(folder), options, traffic, lose=True))
    digests = {json.dumps(figure["digests"]) for figure in figures}
    print(json.dumps({"rows": options.rows, "same_digests": len(digests) == 1, "runs": figures, **summarize(figures),
                      **describe_machine()}))  # fmt: skip
    if len(digests) != 1:
        raise SystemExit("the ways end with other rows")


def fill_bucket(client: Any, folder: Path, options: argparse.Namespace) -> None:
    """Put the rows into the bucket, as JSONL files of ROWS_PER_FILE lines."""
    path = folder / "rows.jsonl"
    if options.short:
        write_short_rows(path, options.rows)
    else:
        write_rows(path, options.texts, options.rows)
    with path.open("rb") as lines:
        for number in range(-(-options.rows // ROWS_PER_FILE)):
            part = b"".join(line for _, line in zip(range(ROWS_PER_FILE), lines, strict=False))
            client.put_object(Bucket=BUCKET, Key=f"in/{number:05}.jsonl", Body=part)
    path.unlink()


def write_short_rows(path: Path, num_rows: int) -> None:
    """Write rows of a question and an answer of some words, no two alike."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            file.write(
                f'{{"prompt": "question {number} of many", "completion": "answer {number * 7919 % num_rows}"}}\n'
            )


def measure(
    way: str, folder: Path, options: argparse.Namespace, traffic: Traffic, *, lose: bool = False
) -> dict[str, Any]:
    """Run one way in a process of its own; return its figures."""
    home = Path(tempfile.mkdtemp(dir=folder))
    environment = {**os.environ, "SFT_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("SFT_RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.benchmarks.cluster", "--work", str(home), "--tokenizer"]
    command += [str(options.tokenizer), *(["--ingest-only"] if options.ingest_only else [])]
    with _started(way, environment) as nodes:
        families = [] if nodes is None else [psutil.Process(each.pid) for each in nodes.processes]
        before, store = count_cpu_seconds(families), _Store()
        served = time.process_time()  # the store is in this process, which else only waits
        traffic.clear()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        losing: AbstractContextManager[list[str]] = nullcontext([])
        if lose and nodes is not None:
            losing = _start_losing(nodes, home)
        with store, losing as killed:
            # Before it Ray tells of the workers that it lost.
            line = next((line for line in process.stdout if line.startswith("{")), "")
        served = time.process_time() - served
        used = 0.0 if lose else count_cpu_seconds([*families, psutil.Process(process.pid)]) - before
        process.communicate("\n")
        if process.returncode or not line:
            raise SystemExit(f"{way} failed")
    cpu = {"cpu_seconds": round(used, 1), "server_cpu_seconds": round(served, 1)}
    figures = {"way": way, "killed": killed, **cpu, **json.loads(line), "peak_store_bytes": store.peak}
    figures |= {"requests": sum_by_method(traffic.requests), "moved_bytes": sum(traffic.num_bytes.values())}
    kinds = {kind: (traffic.requests[kind], traffic.num_bytes[kind]) for kind in sorted(traffic.requests)}
    figures["requests_and_bytes_by_folder"] = kinds
    print(figures, flush=True)
    shutil.rmtree(home)
    return figures


def sum_by_method(requests: Mapping[str, int]) -> dict[str, int]:
    """Return the number of requests of each method."""
    found: Counter[str] = Counter()
    for kind, number in requests.items():
        found[kind.partition(" ")[0]] += number
    return dict(found)


@contextmanager
def _started(way: str, environment: dict[str, str]) -> Iterator[Nodes | None]:
    """Start what the way runs on, and name it in the environment."""
    if way == "local":
        yield None
        return
    environment |= {**_TOKEN, "PYTHONPATH": f"{ROOT / 'tasks' / 'unimported'}{os.pathsep}{ROOT}"}
    os.environ.update({**_TOKEN, **_SOON, "PYTHONPATH": environment["PYTHONPATH"]})
    with start_nodes(_CORES) as nodes:
        environment["SFT_RAY_ADDRESS"] = nodes.address
        yield nodes


@contextmanager
def _start_losing(nodes: Nodes, home: Path) -> Iterator[list[str]]:
    """Kill a worker when some shards are read, and a machine when as many again are."""
    last = nodes.join()
    done, killed = threading.Event(), list[str]()

    def lose() -> None:
        losses = ((3, "worker", lambda: _kill_worker(last)), (6, "machine", lambda: nodes.kill(last)))
        for wanted, name, kill in losses:
            while len(list(home.glob("dataset/shards/*/summary.json"))) < wanted:
                if done.wait(0.1):
                    return
            kill()
            killed.append(name)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def _kill_worker(node: "subprocess.Popen[bytes]") -> None:
    workers = [each for each in psutil.Process(node.pid).children(recursive=True) if each.name().startswith("ray::")]
    assert workers, "no worker is there to be killed"
    workers[0].kill()


class _Store:
    """The largest use of the cluster's object stores, which lie in /dev/shm, those of both machines together."""

    def __init__(self) -> None:
        self.peak, self._before = 0, shutil.disk_usage("/dev/shm").used
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "_Store":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_WATCH_SECONDS):
            self.peak = max(self.peak, shutil.disk_usage("/dev/shm").used - self._before)


def count_cpu_seconds(families: Sequence[psutil.Process]) -> float:
    """Return the processor time of processes with all that they have started, ended ones among them."""
    total = 0.0
    for family in families:
        for process in (family, *family.children(recursive=True)):
            try:
                total += sum(process.cpu_times()[:4])
            except psutil.NoSuchProcess:
                continue
    return total


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Read the bucket's rows, tokenize them, and put tables and tokens into the bucket.

    The cluster's workers put them there by themselves; what is made on this machine is uploaded at the end.
    """
    from schemas.config import DataConfig, TokenizationConfig
    from tasks import execution, storage
    from tasks.ingestion.dataset import build_dataset
    from tasks.ingestion.splitting.order import Store
    from tasks.stored_files import read_list
    from tasks.tokenization.examples import tokenize_dataset, tokenize_stored
    from tasks.tokenization.templates import prepare_tokenizer

    home, prepared = Path(options.work), prepare_tokenizer(options.tokenizer, None)
    data = DataConfig(source=f"s3://{BUCKET}/in", eval_fraction=0.001)
    config = TokenizationConfig(max_truncated_fraction=1.0)
    place = f"s3://{BUCKET}/out"
    store = Store(f"{place}/dataset", f"{place}/scratch") if execution.spreads_to_cluster() else None
    tables = home / "dataset", home / "tokens"

    def tokenize() -> Any:
        if store is None:
            return tokenize_dataset(tables[0], prepared, tables[1], config)
        return tokenize_stored(tables[0], store.tables, f"{place}/tokens", prepared, tables[1], config)

    steps: dict[str, Callable[[], Any]] = {
        "ingestion": lambda: build_dataset(data, seed=0, folder=tables[0], store=store),
        "tokenization": tokenize,
        "upload": lambda: upload(home, ("dataset", "tokens")),
    }
    seconds, memory, own, results = {}, {}, {}, {}
    for name, step in list(steps.items())[: 1 if options.ingest_only else None]:
        begin, used = time.perf_counter(), time.process_time()
        results[name] = step()
        own[name] = round(time.process_time() - used, 2)
        seconds[name] = round(time.perf_counter() - begin, 2)
        memory[name] = read_peak_bytes()
        print(name, seconds[name], memory[name], file=sys.stderr, flush=True)
    counts = results["ingestion"]
    if not options.ingest_only:
        tokens = results["tokenization"]
        assert counts.rows_train == tokens.rows_train + sum(tokens.rows_rejected.values())
    digests = [storage.digest_folder(home / name) for name in ("dataset", "tokens") if (home / name).is_dir()]
    return {
        "seconds": {**seconds, "all": round(sum(seconds.values()), 2)},
        "own_cpu_seconds": own,
        "peak_rss_bytes": memory,
        "here_bytes": sum(file.stat().st_size for table in tables for file in table.rglob("*") if file.is_file()),
        "stored_bytes": sum(file.num_bytes for table in tables for file in read_list(table).values()),
        "digests": digests,
    }


def upload(home: Path, names: Sequence[str]) -> None:
    """Put the files of folders into the bucket, as MLflow's store for S3 does it."""
    import boto3  # type: ignore[import-untyped]

    client = boto3.client("s3")
    for file in sorted(path for name in names for path in (home / name).rglob("*") if path.is_file()):
        client.upload_file(str(file), BUCKET, f"out/{file.relative_to(home).as_posix()}")


def read_peak_bytes() -> int:
    """Return the largest resident memory that this process had so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def summarize(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of the medians of the undisturbed runs, Ray's to the local pool's."""
    ways: dict[str, list[dict[str, Any]]] = {"local": [], "ray": []}
    for figure in figures:
        if not figure["killed"]:
            ways[figure["way"]].append(figure)
    if not all(ways.values()):
        return {}
    time_of = {way: statistics.median(each["seconds"]["all"] for each in runs) for way, runs in ways.items()}
    cpu_of = {way: statistics.median(each["cpu_seconds"] for each in runs) for way, runs in ways.items()}
    return {
        "ratio_of_seconds": round(time_of["ray"] / time_of["local"], 3),
        "ratio_of_cpu_seconds": round(cpu_of["ray"] / cpu_of["local"], 3),
    }


if __name__ == "__main__":
    main()
