"""Training speed and memory on a GPU, beside other trainers, on the same rows and model shapes.

    python tests/benchmarks/gpu.py --work /tmp/bench [--only NAME …] [--peer unsloth=PATH …]

Every row of the table is a process of its own, one after the other. Models have random weights in real shapes: speed
does not depend on the values. Tokens are real ones, without padding; a rate is taken after the first steps. A peer runs
with PATH first on its PYTHONPATH (a `pip install --target` folder), or with what is installed here. The last line is
one JSON object.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip
_PACKED = {"rank": 64, "alpha": 128, "packing": True}
_KEPT = {**_PACKED, "tokens_per_pack": 24576, "micro_batch": 1}
_LEAN = {**_PACKED, "tokens_per_pack": 8192, "micro_batch": 1, "gradient_accumulation_steps": 4}
# What is run: who, shape, settings; steps in all.
RUNS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "ours-7b": ("ours", "qwen2.5-7b", {**_KEPT, "gradient_checkpointing": False}, 11),
    "ours-7b-lean": ("ours", "qwen2.5-7b", {**_LEAN, "gradient_checkpointing": True}, 9),
    "ours-7b-fp8": ("ours", "qwen2.5-7b", {**_KEPT, "gradient_checkpointing": False, "base_weights": "fp8"}, 12),
    "ours-7b-fp8-lean": ("ours", "qwen2.5-7b", {**_LEAN, "gradient_checkpointing": True, "base_weights": "fp8"}, 9),
    "ours-7b-defaults": ("ours", "qwen2.5-7b", {}, 40),
    "ours-0.6b": ("ours", "qwen3-0.6b", {**_KEPT, "tokens_per_pack": 65536}, 15),
    "unsloth-7b": ("unsloth", "qwen2.5-7b", {"checkpointing": False, "batch": 8, "accumulation": 2}, 10),
    "unsloth-7b-lean": ("unsloth", "qwen2.5-7b", {"checkpointing": "unsloth", "batch": 8, "accumulation": 2}, 8),
    "unsloth-0.6b": ("unsloth", "qwen3-0.6b", {"checkpointing": False, "batch": 16, "accumulation": 2}, 12),
    "trl-7b": ("trl", "qwen2.5-7b", {"checkpointing": False, "batch": 8, "accumulation": 2}, 9),
    "trl-7b-lean": ("trl", "qwen2.5-7b", {"checkpointing": True, "batch": 8, "accumulation": 2}, 8),
    "llamafactory-7b-recipe": ("llamafactory", "qwen2.5-7b", {"batch": 2, "accumulation": 8}, 8),
}
# Rows of the table: what, ours, against, at least, and the most memory in GiB.
TABLE: list[tuple[str, str, str, float, float | None]] = [
    ("7B, bf16, no checkpointing", "ours-7b", "unsloth-7b", 1.3, None),
    ("7B, bf16, checkpointing", "ours-7b-lean", "unsloth-7b-lean", 1.2, 21.0),
    ("7B, FP8 base, no checkpointing", "ours-7b-fp8", "unsloth-7b", 1.75, None),
    ("7B, FP8 base, checkpointing", "ours-7b-fp8-lean", "unsloth-7b-lean", 1.7, 24.0),
    ("7B, defaults", "ours-7b-defaults", "llamafactory-7b-recipe", 11.0, None),
    ("0.6B, bf16", "ours-0.6b", "unsloth-0.6b", 1.5, None),
    ("7B, bf16, beside TRL's best", "ours-7b", "trl-7b", 1.0, None),
    ("7B, bf16, checkpointing, beside TRL's best", "ours-7b-lean", "trl-7b-lean", 1.0, None),
]
NUM_ROWS = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sft-bench"), help="models and logs")
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="runs to do")
    parser.add_argument("--peer", nargs="*", default=[], help="NAME=PATH, first on the peer's PYTHONPATH")
    parser.add_argument("--limit", type=int, default=240, help="seconds a run may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, shape, settings, steps = RUNS[options.one]
        run = {"ours": run_ours, "unsloth": run_unsloth, "trl": run_trl, "llamafactory": run_llamafactory}[who]
        print("RESULT", json.dumps(run(options.work / shape, settings, steps)), flush=True)
        os._exit(0)  # some trainers hang in their own endings
    paths = dict(entry.split("=", 1) for entry in options.peer)
    for shape in sorted({RUNS[name][1] for name in options.only}):
        prepare(options.work / shape, shape)
    results = {name: call(name, options.work, paths.get(RUNS[name][0]), options.limit) for name in options.only}
    report(results)


def draw_lengths() -> list[tuple[int, int]]:
    """Draw prompt and answer lengths: lognormal, medians 60 and 180, sigmas 0.8 and 0.9, 2,048 tokens together."""
    import numpy as np

    generator = np.random.default_rng(0)
    prompts = np.clip(generator.lognormal(math.log(60), 0.8, NUM_ROWS), 8, 1024).astype(int)
    answers = np.clip(generator.lognormal(math.log(180), 0.9, NUM_ROWS), 4, 1536).astype(int)
    return [(int(p), int(min(a, 2048 - p))) for p, a in zip(prompts, answers, strict=True)]


def draw_rows() -> list[dict[str, list[int]]]:
    """Give every row its ids and the mask of its answer."""
    import numpy as np

    generator = np.random.default_rng(1)
    return [
        {"input_ids": generator.integers(10, 150_000, p + a).tolist(), "completion_mask": [0] * p + [1] * a}
        for p, a in draw_lengths()
    ]


def prepare(folder: Path, shape: str) -> None:
    """Save a model with random weights, and the rows as a tokens folder, unless they are there."""
    if (folder / "done").exists():
        return
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    settings = dict(SHAPES[shape])
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(
        settings.pop("model_type"), **settings, max_position_embeddings=32768, dtype="bfloat16", **special
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model", max_shard_size="4GB")
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "model")
    rows = draw_rows()
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
    del model
    torch.cuda.empty_cache()


def call(name: str, work: Path, path: str | None, limit: int) -> dict[str, Any]:
    """Do a run in a process of its own; its output goes to a log."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    inherited = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(ROOT), None if path else inherited]))
    log = work / f"{name}.log"
    started = time.perf_counter()
    with log.open("wb") as output, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, __file__, "--work", str(work), "--one", name],
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
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(json.dumps({"device": device, "torch": torch.__version__, "runs": results, "table": rows}))


def summarize(times: list[float], tokens: list[int], skip: int) -> dict[str, Any]:
    """Return the rate after the first `skip` steps, and the memory at its highest."""
    import torch

    seconds = times[-1] - times[skip - 1]
    return {
        "tokens_per_second": round(sum(tokens[skip:]) / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "tokens_per_step": round(sum(tokens[skip:]) / len(tokens[skip:])),
    }


def run_ours(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run the training stage's own function."""
    import logging
    import shutil

    from schemas.config import TrainingConfig
    from tasks.training.loop import train_adapter

    logging.basicConfig(level=logging.INFO)
    times: list[float] = []
    tokens: list[int] = []

    def note(record: Any) -> None:
        times.append(time.perf_counter())
        tokens.append(record.num_tokens)
        print(record, flush=True)

    config = TrainingConfig(**settings, max_steps=steps, checkpoint_every_steps=10_000)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    started = time.perf_counter()
    outcome = train_adapter(
        folder / "model", folder / "tokens", run, config, seed=0, identity="benchmark", on_step=note
    )
    shutil.rmtree(run, ignore_errors=True)
    return {
        **summarize(times, tokens, max(2, steps // 4)),
        "first_step_seconds": round(times[0] - started, 1),
        "final_loss": round(outcome.final_loss, 3),
        "warnings": list(outcome.warnings),
    }


def run_trl(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run TRL at its best: packing, Liger's kernels, FlashAttention."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.bfloat16, attn_implementation="flash_attention_2", device_map={"": 0}
    )
    adapter = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    config = SFTConfig(**_trainer_settings(folder, settings, steps), use_liger_kernel=True, bf16=True)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(draw_rows()), peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    return _time_trainer(trainer, steps)


def run_unsloth(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run Unsloth at its best: its own model, packing, no dropout."""
    import torch
    from unsloth import FastLanguageModel  # isort: skip
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    checkpointing = settings["checkpointing"]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder / "model"), max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=False,
        use_gradient_checkpointing=checkpointing, use_exact_model_name=True,
    )  # fmt: skip
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=64, lora_alpha=128, lora_dropout=0.0, bias="none", target_modules=names,
        use_gradient_checkpointing=checkpointing, random_state=0, max_seq_length=2048,
    )  # fmt: skip
    arguments = _trainer_settings(folder, settings, steps)
    arguments.pop("gradient_checkpointing")
    config = SFTConfig(**arguments, bf16=True, optim="adamw_torch_fused")
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(draw_rows()), processing_class=tokenizer
    )
    return _time_trainer(trainer, steps)


def _trainer_settings(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return what TRL and Unsloth, which stands on it, are told alike."""
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": settings["accumulation"],
        "max_steps": steps,
        "learning_rate": 1e-4,
        "gradient_checkpointing": bool(settings["checkpointing"]),
        "max_length": 2048,
        "packing": True,
        "completion_only_loss": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def _time_trainer(trainer: Any, steps: int) -> dict[str, Any]:
    """Train, with a clock at the end of each step and a count of the tokens that go in."""
    import torch
    from transformers import TrainerCallback

    counts: list[Any] = [0]
    times: list[float] = []
    tokens: list[int] = []
    inner = trainer.training_step

    def counting_step(model: Any, inputs: dict[str, Any], *rest: Any, **further: Any) -> Any:
        mask: Any = inputs.get("attention_mask")
        is_padded = mask is not None and mask.dim() == 2
        counts[0] = counts[0] + ((mask != 0).sum() if is_padded else inputs["input_ids"].numel())
        return inner(model, inputs, *rest, **further)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **further: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            tokens.append(int(counts[0]))
            counts[0] = 0
            print("step", len(times), tokens[-1], flush=True)

    trainer.training_step = counting_step
    trainer.add_callback(Clock())
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    skip = max(3, steps // 4)
    return {**summarize(times, tokens, skip), "first_step_seconds": round(times[0] - started, 1)}


def run_llamafactory(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run LLaMA-Factory's documented LoRA recipe through its own entry, on rows of the same lengths as text."""
    import torch
    from transformers import Trainer, TrainerCallback

    data = folder / "llamafactory"
    data.mkdir(exist_ok=True)
    # A word is a token for this tokenizer, whatever the word; the empty template adds nothing.
    rows = [{"instruction": "word " * p, "input": "", "output": "word " * a} for p, a in draw_lengths()]
    (data / "rows.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    config = {
        "model_name_or_path": str(folder / "model"), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 64, "lora_alpha": 128, "lora_target": "all", "dataset": "rows", "dataset_dir": str(data),
        "template": "empty", "cutoff_len": 2048, "overwrite_cache": True, "output_dir": str(data / "out"),
        "logging_steps": 1, "save_strategy": "no", "plot_loss": False, "report_to": "none", "max_steps": steps,
        "per_device_train_batch_size": settings["batch"], "gradient_accumulation_steps": settings["accumulation"],
        "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "bf16": True, "preprocessing_num_workers": 1,
    }  # fmt: skip
    (data / "config.json").write_text(json.dumps(config))  # JSON is YAML too
    counts: list[Any] = [0]
    times: list[float] = []
    tokens: list[int] = []
    inner = Trainer.training_step

    def counting_step(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **further: Any) -> Any:
        counts[0] = counts[0] + (inputs["attention_mask"] != 0).sum()
        return inner(self, model, inputs, *rest, **further)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **further: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            tokens.append(int(counts[0]))
            counts[0] = 0
            print("step", len(times), tokens[-1], flush=True)

    Trainer.training_step = counting_step  # type: ignore[method-assign]
    from llamafactory.train.tuner import run_exp

    started = time.perf_counter()
    run_exp(args=config, callbacks=[Clock()])
    return {**summarize(times, tokens, max(3, steps // 4)), "first_step_seconds": round(times[0] - started, 1)}


if __name__ == "__main__":
    main()
