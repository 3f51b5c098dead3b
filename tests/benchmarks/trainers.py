"""The trainers that `gpu` runs, ours and the peers: each trains on the same rows and returns its rate and memory."""

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


def _read_vocabulary(folder: Path) -> int:
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


def run_trl(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run TRL at its best: packing, Liger's kernels, FlashAttention; all weights in fp32, or LoRA; FSDP2 on ranks."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    is_full = settings.get("full", False)
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(place)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32 if is_full else torch.bfloat16, device_map={"": place},
        attn_implementation=settings.get("attention", "flash_attention_2"),
    )  # fmt: skip
    rank = settings.get("rank", 64)
    adapter = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", target_parameters=settings.get("parameters"),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    arguments = _trainer_settings(folder, settings, steps)
    if settings.get("dpo"):
        return _run_trl_dpo(folder, model, adapter, arguments, steps)
    if settings.get("num_processes", 1) > 1:
        arguments |= _divide_by_fsdp(model, settings)
    config = SFTConfig(**arguments, use_liger_kernel=True, bf16=True)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(draw_rows(_read_vocabulary(folder))),
        peft_config=None if is_full else adapter,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    result = _time_trainer(trainer, steps)
    return {**result, "engine": f"{type(trainer.model_wrapped).__name__}, FSDP {bool(trainer.is_fsdp_enabled)}"}


def _divide_by_fsdp(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers' trainers are told to divide a model by FSDP2, and to run its layers again if wanted."""
    return {
        "gradient_checkpointing": False,  # FSDP's own does it
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": list(model._no_split_modules),
            "activation_checkpointing": bool(settings["checkpointing"]),
            "reshard_after_forward": True,
        },
    }


def _run_trl_dpo(folder: Path, model: Any, adapter: Any, arguments: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run TRL's DPO at its best: the reference computed beforehand, Liger's kernels; it has no packing."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):  # type: ignore[misc,unused-ignore]
        def _prepare_dataset(self, dataset: Any, *arguments: Any, **further: Any) -> Any:
            return dataset  # has ids already

    for name in ("packing", "completion_only_loss"):
        arguments.pop(name)
    config = DPOConfig(
        **{**arguments, "learning_rate": 1e-5}, precompute_ref_log_probs=True, precompute_ref_batch_size=16,
        use_liger_kernel=True, bf16=True, beta=0.1,
    )  # fmt: skip
    # The reference of the rows that the steps take is not timed, and no more rows are there than these.
    count = steps * arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    trainer = Trainer(
        model=model, args=config, train_dataset=Dataset.from_list(draw_pairs()[:count]), peft_config=adapter,
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
    names += settings.get("further_targets", [])
    rank = settings.get("rank", 64)
    model = FastLanguageModel.get_peft_model(
        model, r=rank, lora_alpha=2 * rank, lora_dropout=settings.get("dropout", 0.0), bias="none",
        target_modules=names,
        use_gradient_checkpointing=checkpointing, random_state=0, max_seq_length=2048,
    )  # fmt: skip
    arguments = _trainer_settings(folder, settings, steps)
    arguments.pop("gradient_checkpointing")
    config = SFTConfig(**arguments, bf16=True)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(draw_rows(_read_vocabulary(folder))),
        processing_class=tokenizer,
    )
    return _time_trainer(trainer, steps)


def _trainer_settings(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return what TRL and Unsloth, which stands on it, are told alike."""
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": settings["accumulation"],
        "max_steps": steps,
        "learning_rate": 1e-5 if settings.get("full") else 1e-4,
        "optim": settings.get("optimizer", "adamw_torch_fused"),
        "gradient_checkpointing": bool(settings["checkpointing"]),
        "max_length": 2048,
        "packing": settings.get("packing", True),
        "completion_only_loss": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def _time_trainer(trainer: Any, steps: int) -> dict[str, Any]:
    """Train, with a clock at the end of each step and a count of the tokens that go in."""
    import torch

    clock = _build_clock()
    inner = trainer.training_step

    def counting_step(model: Any, inputs: dict[str, Any], *rest: Any, **further: Any) -> Any:
        clock.count(inputs)
        return inner(model, inputs, *rest, **further)

    trainer.training_step = counting_step
    trainer.add_callback(clock)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    return clock.tell(started, steps)


def _build_clock() -> Any:
    """Return a callback of transformers' trainers that takes the time of each step and counts what went into it."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.pending: Any = 0  # stays on the device until the step's end
            self.times: list[float] = []
            self.tokens: list[int] = []

        def count(self, inputs: dict[str, Any]) -> None:
            mask: Any = inputs.get("attention_mask")
            is_padded = mask is not None and mask.dim() == 2
            self.pending = self.pending + ((mask != 0).sum() if is_padded else inputs["input_ids"].numel())

        def on_step_end(self, *arguments: Any, **further: Any) -> None:
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            self.tokens.append(_sum_over_ranks(int(self.pending)))
            self.pending = 0
            print("step", len(self.times), self.tokens[-1], flush=True)

        def tell(self, started: float, steps: int) -> dict[str, Any]:
            first = round(self.times[0] - started, 1)
            return {**summarize(self.times, self.tokens, max(3, steps // 4)), "first_step_seconds": first}

    return Clock()


def _sum_over_ranks(number: int) -> int:
    """Return the sum of all ranks' numbers."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return number
    total = torch.tensor(number, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(total)
    return int(total)


def run_llamafactory(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run LLaMA-Factory through its own entry, on rows of the same lengths as text.

    LoRA by its documented recipe; all weights, which it keeps in fp32, at its best: packed, Liger, FlashAttention.
    """
    import torch
    from transformers import Trainer

    data = folder / "llamafactory"
    data.mkdir(exist_ok=True)
    # A word is a token for this tokenizer, whatever the word; the empty template adds nothing.
    rows = [{"instruction": "word " * p, "input": "", "output": "word " * a} for p, a in draw_lengths()]
    (data / "rows.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    config = {
        "model_name_or_path": str(folder / "model"), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 64, "lora_alpha": 128, "lora_target": "all",
        "dataset": "rows", "dataset_dir": str(data), "template": "empty", "cutoff_len": 2048, "overwrite_cache": True,
        "output_dir": str(data / "out"), "logging_steps": 1, "save_strategy": "no",
        "plot_loss": False, "report_to": "none", "max_steps": steps, "learning_rate": 1e-4,
        "per_device_train_batch_size": settings["batch"], "gradient_accumulation_steps": settings["accumulation"],
        "lr_scheduler_type": "cosine", "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(), "preprocessing_num_workers": 1,
    }  # fmt: skip
    if settings.get("full"):
        config |= {
            "finetuning_type": "full", "learning_rate": 1e-5, "cutoff_len": settings["packed_tokens"],
            "neat_packing": True, "flash_attn": "fa2", "enable_liger_kernel": True,
            "disable_gradient_checkpointing": not settings["checkpointing"],
        }  # fmt: skip
    (data / "config.json").write_text(json.dumps(config))  # JSON is YAML too
    clock = _build_clock()
    inner = Trainer.training_step

    def counting_step(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **further: Any) -> Any:
        clock.count(inputs)
        return inner(self, model, inputs, *rest, **further)

    Trainer.training_step = counting_step  # type: ignore[method-assign]
    from llamafactory.train.tuner import run_exp

    started = time.perf_counter()
    run_exp(args=config, callbacks=[clock])
    return clock.tell(started, steps)
