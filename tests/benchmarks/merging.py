"""The merge of a large model: seconds beside a plain copy of the same bytes, memory, and the parity check.

    python tests/benchmarks/merging.py --shape 7b --work /tmp/merging

Makes a random bf16 checkpoint of the shape and a LoRA adapter (r = 64, all linear layers), copies the checkpoint,
merges it, and digests the result, each in a process of its own; every file is read from the disk again and written to
the disk before the clock stops. The parity check runs where there is a GPU, or with --parity. Memory is the largest
resident set, pages of mapped files included, and the largest anonymous part of it. The last line is a JSON object.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RANK = 64
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings: Qwen2.5's models.
SHAPES = {
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "tiny": (128, 256, 2, 4, 2, 1024, True),
}
HOST_LIMIT_GIB = 8.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--work", type=Path, default=Path("/tmp/sft-merging"))
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--parity", action="store_true", help="also without a GPU")
    parser.add_argument("--one", choices=["make", "copy", "merge", "digest", "parity"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work = {"make": make, "copy": copy, "merge": merge, "digest": digest, "parity": check}[options.one]
        print("RESULT", json.dumps(watch(work, options)), flush=True)
        return
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    steps = ["make", "copy", "merge", "digest"]
    import torch

    if torch.cuda.is_available() or options.parity:
        steps.append("parity")
    results = {}
    for name in steps:
        results[name] = call(name, options)
        if name == "copy":
            shutil.rmtree(options.work / "copy")
    report(options, results)
    shutil.rmtree(options.work)


def call(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Do one step in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--shape", options.shape, "--work", str(options.work)]
    command += ["--max-shard-size", options.max_shard_size]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name} failed with exit code {run.returncode}:\n{run.stdout[-2000:]}")
    print(f"{name}: {lines[-1][7:]}", flush=True)
    result: dict[str, Any] = json.loads(lines[-1][7:])
    return result


def watch(work: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time a step, and note the largest resident memory and its anonymous part."""
    peak = [0]
    done = threading.Event()

    def note() -> None:
        while not done.wait(0.02):
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak[0] = max(peak[0], int(fields["RssAnon"].split()[0]))

    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    extra = work(options) or {}
    done.set()
    thread.join()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "peak_gib": round(used.ru_maxrss / 2**20, 2),  # KiB on Linux
        "peak_anonymous_gib": round(peak[0] / 2**20, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        **extra,
    }


def make(options: argparse.Namespace) -> dict[str, Any]:
    """Write the base model, the adapter and a tokenizer."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import Qwen2Config

    from tests.benchmarks.random_weights import save_tokenizer

    hidden, intermediate, layers, heads, groups, vocabulary, tied = SHAPES[options.shape]
    base, adapter = options.work / "base", options.work / "adapter"
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=tied, dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"], bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # Copies of one drawn block: drawing 7 billion numbers on a CPU would take longer than all the rest.
    drawn = (0.02 * torch.randn(1 << 24, device=device)).bfloat16()

    def draw(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return drawn.repeat(-(-count // len(drawn)))[:count].view(shape).to("cpu", copy=True)

    trained: dict[str, torch.Tensor] = {}
    total = write_shards(base, draw_weights(SHAPES[options.shape], draw, trained))
    adapter.mkdir()
    names = sorted({name.split(".")[-3] for name in trained})
    LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=names).save_pretrained(str(adapter))
    save_file(trained, adapter / "adapter_model.safetensors")
    save_tokenizer(options.work / "tokenizer")
    return {"num_bytes": total}


def draw_weights(
    shape: tuple[int, int, int, int, int, int, bool], draw: Callable[..., Any], trained: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Give the base's weights layer by layer, what is beside them with the first; the adapter's go to `trained`."""
    import torch

    hidden, intermediate, layers, heads, groups, vocabulary, tied = shape
    weights = {"model.embed_tokens.weight": draw(vocabulary, hidden)}
    if not tied:
        weights["lm_head.weight"] = draw(vocabulary, hidden)
    weights["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    size = hidden // heads
    sides = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (groups * size, hidden),
        "self_attn.v_proj": (groups * size, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip
    for layer in range(layers):
        path = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{path}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, (outs, ins) in sides.items():
            weights[f"{path}.{name}.weight"] = draw(outs, ins)
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                weights[f"{path}.{name}.bias"] = draw(outs)
            trained[f"base_model.model.{path}.{name}.lora_A.weight"] = draw(RANK, ins).float()
            trained[f"base_model.model.{path}.{name}.lora_B.weight"] = 0.2 * draw(outs, RANK).float()
        yield weights
        weights = {}


def write_shards(folder: Path, layers: Iterator[dict[str, Any]], *, least: int = 10**9) -> int:
    """Write weights as a checkpoint in shards of at least so many bytes; return the bytes of all."""
    from safetensors.torch import save_file

    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    number = 0

    def flush() -> None:
        nonlocal shard, number
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard = {}

    for weights in layers:
        shard |= weights
        del weights
        if sum(tensor.nbytes for tensor in shard.values()) >= least:
            flush()
    if shard:
        flush()
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def forget(folder: Path) -> None:
    """Write a folder's files to the disk and let the system forget what it read of them."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(options: argparse.Namespace) -> dict[str, Any]:
    """Copy the checkpoint through this process, 16 MiB at a time."""
    forget(options.work / "base")
    (options.work / "copy").mkdir()
    started = time.perf_counter()
    for path in sorted((options.work / "base").glob("*.safetensors")):
        with path.open("rb") as source, (options.work / "copy" / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
    return {"seconds": round(time.perf_counter() - started, 2)}


def merge(options: argparse.Namespace) -> dict[str, Any]:
    """Merge by the stage's own function."""
    from tasks.merging.weights import merge_adapter

    work = options.work
    forget(work / "base")
    started = time.perf_counter()
    merge_adapter(
        work / "base", work / "adapter", work / "tokenizer", work / "merged", max_shard_size=options.max_shard_size
    )
    return {"seconds": round(time.perf_counter() - started, 2)}


def digest(options: argparse.Namespace) -> dict[str, Any]:
    """Digest the merged model as the stage does before it keeps the folder; its bytes are in memory then as well."""
    from tasks import storage

    started = time.perf_counter()
    storage.digest_folder(options.work / "merged")
    return {"seconds": round(time.perf_counter() - started, 2)}


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Run the stage's parity check; random weights decide between near tokens by rounding, so no limit is set."""
    import torch

    from schemas.config import MergeConfig
    from tasks.merging.parity import check_merge

    work, vocabulary = options.work, SHAPES[options.shape][5]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, vocabulary, (64,), generator=generator).tolist() for _ in range(16)]
    config = MergeConfig(min_greedy_agreement=0.0, max_logit_diff=1000.0)
    started = time.perf_counter()
    result = check_merge(work / "base", work / "adapter", work / "merged", prompts, config)
    seconds = round(time.perf_counter() - started, 2)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"seconds": seconds, "peak_gpu_gib": round(peak, 2), **result.model_dump()}


def report(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Print what was measured, and the JSON object."""
    num_bytes = results["make"]["num_bytes"]
    for name in ("copy", "merge", "digest"):
        seconds = results[name]["seconds"]
        print(
            f"{name:8} {seconds:8.1f} s {num_bytes / seconds / 1e9:8.2f} GB/s, peak {results[name]['peak_gib']:.2f} GiB"
        )
    ratio = results["copy"]["seconds"] / results["merge"]["seconds"]
    peak = results["merge"]["peak_gib"]
    print(f"merge: {ratio:.2f} of the copy's speed, peak {peak:.2f} GiB (wanted below {HOST_LIMIT_GIB:g})")
    met = peak < HOST_LIMIT_GIB
    values = {"shape": options.shape, "num_bytes": num_bytes, "cores": os.cpu_count(), "speed_of_copy": round(ratio, 3)}
    print(json.dumps({**values, "memory_met": met, "steps": results}))


if __name__ == "__main__":
    main()
