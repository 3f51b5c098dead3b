"""Hands the pipeline inputs that a seed draws, and counts how they end.

    python -m tests.laboratory.fuzz --cases 2000 --seed 7

Each input ends in one of these ways: done; refused, by an error of ours; a traceback, by any other error; rows that are
not accounted for; a hang; or a dead process. Only the first two are right. Inputs are handled one after the other by a
process that is killed after a minute without an answer, and started again. A single case is done again by
`--case KIND:SEED`, with its trace.
"""

import argparse
import asyncio
import json
import os
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

from tests.laboratory.chat_requests import draw_request
from tests.laboratory.inputs import DEMO_MODEL, ROOT, draw_config, draw_dataset, draw_model, draw_rows, draw_template
from tests.laboratory.oddities import draw_foreign, draw_settings

HANG_SECONDS = 60.0
"""Of computing; what only waits, or waits its turn on a busy machine, has _WAITS times as long."""
_WAITS = 5
MEMORY_BYTES = 12 << 30
KINDS = ("config", "dataset", "model", "template", "import", "settings", "plan", "request")
RIGHT = ("done", "refused")
_OURS = tuple(str(ROOT / name) for name in ("flows", "tasks", "schemas"))
_MOST_CHARACTERS = 6000


class RefusedError(ValueError):
    """A server has answered that it does not do what it was asked."""


class UnaccountedError(AssertionError):
    """Rows that went in did not come out."""


def main(arguments: list[str] | None = None) -> int:
    """Run the cases, print how they ended, and return 1 where one ended wrongly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--case", help="KIND:SEED of one case")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return _work()
    if options.case:
        kind, _, seed = options.case.partition(":")
        with _tiny_model() as tiny:
            print(handle(kind, int(seed), tiny))
        return 0
    kinds = (options.kind,) if options.kind else KINDS
    cases = [(kinds[number % len(kinds)], options.seed * 1_000_000 + number) for number in range(options.cases)]
    print(f"{len(cases)} cases of seed {options.seed}", flush=True)
    began, wrong, counts = time.monotonic(), 0, Counter[tuple[str, str]]()
    for kind, seed, way, detail in run_cases(cases):
        counts[kind, way] += 1
        if way not in RIGHT:
            wrong += 1
            print(f"{way}: --case {kind}:{seed}: {detail}", flush=True)
    for (kind, way), number in sorted(counts.items()):
        print(f"{kind:10} {way:12} {number:6}")
    print(f"{wrong} of {len(cases)} ended wrongly; seed {options.seed}, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


def run_cases(cases: list[tuple[str, int]]) -> Iterator[tuple[str, int, str, str]]:
    """Give for each case its kind and seed, how it ended, and what was said."""
    worker: _Worker | None = None
    try:
        for kind, seed in cases:
            if worker is None:
                worker = _Worker()
            way, detail = worker.ask(kind, seed)
            if way in ("hang", "dead process"):
                worker.end()
                worker = None
            yield kind, seed, way, detail
    finally:
        if worker is not None:
            worker.end()


class _Worker:
    """A process that handles cases."""

    def __init__(self) -> None:
        self._home = tempfile.mkdtemp(prefix="sft-fuzz-")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        environment = {**os.environ, "SFT_HOME": self._home, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.laboratory.fuzz", "--worker"],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._answers.get(timeout=300) == "ready\n", self._read_errors()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, kind: str, seed: int) -> tuple[str, str]:
        """Hand a case over and wait for how it ends."""
        assert self._process.stdin is not None
        print(json.dumps([kind, seed]), file=self._process.stdin, flush=True)
        began, before = time.monotonic(), self._cpu_seconds()
        while True:
            try:
                answer = self._answers.get(timeout=HANG_SECONDS / 20)
                break
            except queue.Empty:
                waited, computed = time.monotonic() - began, self._cpu_seconds() - before
                if computed > HANG_SECONDS or waited > _WAITS * HANG_SECONDS:
                    return "hang", f"no answer after {waited:.0f} s, {computed:.0f} s of them computing"
        if not answer:
            return "dead process", f"exit code {self._process.wait()}: {self._read_errors()}"
        way, detail = json.loads(answer)
        return way, detail

    def _cpu_seconds(self) -> float:
        with suppress(psutil.Error):
            times = psutil.Process(self._process.pid).cpu_times()
            return float(times.user + times.system + times.children_user + times.children_system)
        return 0.0

    def _read_errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-300:].replace("\n", " | ")

    def end(self) -> None:
        """Kill it with all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)


def _work() -> int:
    """Handle what comes in, line by line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with _tiny_model() as tiny:
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            kind, seed = json.loads(line)
            print(json.dumps(_judge(kind, seed, tiny)), file=answers, flush=True)
    return 0


@contextmanager
def _tiny_model() -> Iterator[Path]:
    """Give a folder with a model of a few thousand weights, and with the demo's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    vocabulary = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="sft-tiny-") as folder:
        model: Any = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **sizes, **heads))
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO_MODEL / name, Path(folder) / name)
        yield Path(folder)


def _judge(kind: str, seed: int, tiny: Path) -> tuple[str, str]:
    """Handle a case and say how it ended."""
    try:
        return "done", handle(kind, seed, tiny)
    except UnaccountedError as error:
        return "unaccounted", str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error)
        ours = isinstance(error, ValueError) and (
            isinstance(error, RefusedError)
            or type(error).__module__.startswith(("flows.", "tasks.", "schemas."))
            or (type(error) is ValueError and where.filename.startswith(_OURS))
        )
        if ours and len(text) <= _MOST_CHARACTERS:
            return "refused", type(error).__name__
        said = f"{type(error).__module__}.{type(error).__name__} at {where.filename}:{where.lineno}: {text[:200]}"
        return "traceback" if not ours else "flood", said


def handle(kind: str, seed: int, tiny: Path) -> str:
    """Draw a case and do with it what the commands do."""
    draw = Random(seed)
    with tempfile.TemporaryDirectory(prefix="sft-case-") as folder:
        return _HANDLERS[kind](Path(folder), draw, tiny)


def _handle_config(folder: Path, draw: Random, tiny: Path) -> str:
    from schemas.loading import load_config

    return load_config(draw_config(folder, draw)).name


def _handle_import(folder: Path, draw: Random, tiny: Path) -> str:
    from flows.importing import load_any

    path, overrides = draw_foreign(folder, draw)
    return type(load_any(path, overrides)).__name__


def _handle_settings(folder: Path, draw: Random, tiny: Path) -> str:
    from schemas.loading import load_config

    return load_config(ROOT / "deploy" / "configs" / "demo.yaml", draw_settings(draw)).name


def _handle_dataset(folder: Path, draw: Random, tiny: Path) -> str:
    from schemas.config import DataConfig
    from tasks.ingestion.dataset import build_dataset
    from tasks.ingestion.sources.sources import digest_source

    dataset = draw_dataset(folder, draw)
    if not dataset.source:
        return "nothing"
    config = DataConfig(source=dataset.source, max_rejected_fraction=1.0)
    digest_source(config)
    counts = build_dataset(config, seed=0, folder=folder / "out")
    there = counts.rows_train + counts.rows_eval + counts.rows_duplicate + counts.rows_leaked
    there += sum(counts.rows_rejected.values())
    if there != counts.rows_in or (dataset.num_rows is not None and counts.rows_in != dataset.num_rows):
        raise UnaccountedError(f"{dataset.num_rows} rows drawn, {counts.rows_in} in, {there} out")
    return f"{counts.rows_in} rows"


def _handle_model(folder: Path, draw: Random, tiny: Path) -> str:
    from schemas.config import ModelConfig, TokenizationConfig
    from tasks.base_model import limit_length, locate_base_model
    from tasks.models import load_model
    from tasks.tokenization.templates import prepare_tokenizer

    place = Path(locate_base_model(ModelConfig(base_model=str(draw_model(tiny, folder, draw)))).uri)
    prepare_tokenizer(place, None)
    limit_length(TokenizationConfig(), place, "model")
    return type(load_model(place)).__name__


def _handle_template(folder: Path, draw: Random, tiny: Path) -> str:
    from schemas.config import DataConfig, TokenizationConfig
    from tasks.ingestion.dataset import build_dataset
    from tasks.tokenization.examples import tokenize_dataset
    from tasks.tokenization.templates import prepare_tokenizer
    from tests.laboratory.junk import dump

    template = draw_template(folder, draw)
    rows = [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in range(8)]
    (folder / "rows.jsonl").write_bytes(b"".join(dump(row) + b"\n" for row in [*rows, *draw_rows(draw)]))
    config = DataConfig(source=str(folder / "rows.jsonl"), max_rejected_fraction=1.0)
    prepared = prepare_tokenizer(tiny, str(template))
    counts = build_dataset(config, seed=0, folder=folder / "dataset")
    limits = TokenizationConfig(max_length=2048, max_truncated_fraction=1.0)
    tokens = tokenize_dataset(folder / "dataset", prepared, folder / "tokens", limits)
    there = tokens.rows_train + tokens.rows_eval + sum(tokens.rows_rejected.values())
    if there != counts.rows_train + counts.rows_eval:
        raise UnaccountedError(f"{counts.rows_train + counts.rows_eval} conversations, {there} out")
    return f"{tokens.num_examples} examples"


def _handle_plan(folder: Path, draw: Random, tiny: Path) -> str:
    from flows.planning import plan_run
    from schemas.loading import parse_config

    dataset = draw_dataset(folder, draw)
    model = draw_model(tiny, folder, draw) if draw.random() < 0.5 else tiny
    data = {"source": dataset.source, "max_rejected_fraction": 1.0}
    limits = {"max_truncated_fraction": 1.0, "max_length": draw.choice((16, 128, 4096))}
    config = parse_config({"model": {"base_model": str(model)}, "data": data, "tokenization": limits})
    made = plan_run(config, most=100)
    there = sum(number for name, number in made.rows.items() if name != "rows in")
    if made.rows["rows in"] != there or (dataset.num_rows is not None and made.rows["rows in"] != dataset.num_rows):
        raise UnaccountedError(f"{dataset.num_rows} rows drawn, {made.rows}")
    return f"{made.sizes.num_steps} steps, {len(made.problems)} problems"


def _handle_request(folder: Path, draw: Random, tiny: Path) -> str:
    reply = asyncio.run(_post(_open_app(tiny), draw_request(draw)))
    if reply.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise RuntimeError(f"status {reply.status_code}: {reply.text[:300]}")
    if not reply.is_success:
        raise RefusedError(reply.json()["error"]["message"])
    return f"{len(reply.content)} bytes"


async def _post(app: Any, body: bytes) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=HANG_SECONDS) as client:
        return await client.post("/v1/chat/completions", content=body)


@cache
def _open_app(tiny: Path) -> Any:
    from tasks.models import load_model
    from tasks.serving.app import create_app
    from tasks.serving.served_model import open_served
    from tasks.tokenization.templates import prepare_tokenizer

    tokenizer = prepare_tokenizer(tiny, None).tokenizer
    return create_app(open_served(load_model(tiny), tokenizer, tiny, names=("tiny",), num_rows=4))


def _handle_fault(fault: Callable[[], Any]) -> Callable[[Path, Random, Path], str]:
    """Return a handler that goes wrong: the laboratory has to notice."""
    return lambda folder, draw, tiny: str(fault())


def _lose_rows() -> None:
    raise UnaccountedError("2 rows in, 1 out")


_HANDLERS: dict[str, Callable[[Path, Random, Path], str]] = {
    "crash": _handle_fault(os.abort),
    "hang": _handle_fault(lambda: time.sleep(10 * HANG_SECONDS)),
    "traceback": _handle_fault(lambda: os.environ["NOTHING HERE"]),
    "unaccounted": _handle_fault(_lose_rows),
    "config": _handle_config,
    "dataset": _handle_dataset,
    "model": _handle_model,
    "template": _handle_template,
    "import": _handle_import,
    "settings": _handle_settings,
    "plan": _handle_plan,
    "request": _handle_request,
}

if __name__ == "__main__":
    sys.exit(main())
