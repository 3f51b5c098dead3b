"""The peers that `gpu` runs, with their own interpreters: each trains on the same rows and returns rate and memory."""

import json
import os
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.trainers import draw_lengths, draw_pairs, draw_rows, read_vocabulary, summarize


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
        model=model, args=config, train_dataset=Dataset.from_list(draw_rows(read_vocabulary(folder))),
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
        train_dataset=Dataset.from_list(draw_rows(read_vocabulary(folder))),
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
