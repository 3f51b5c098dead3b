"""TRL's whole job, as its documentation has it at its best: `python tests/benchmarks/trl_job.py JOB.json`.

Load, tokenize, answer the held-out rows, train a LoRA adapter, merge, save, answer again. Examples go end to end
without padding through FlashAttention where it is installed, with Liger's kernels where they are. The batch is the
job's. Prints the seconds of each stage; the last line is RESULT and a JSON object. It imports nothing of this project.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_ANSWERS_AT_ONCE = 64
_BEGAN = time.perf_counter()


def main() -> None:
    """Do the job of the file, stage after stage."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    seconds: dict[str, float] = {}
    with _clock(seconds, "start"):
        model, tokenizer = load(job)
    with _clock(seconds, "tokenize"):
        trainer = build_trainer(job, model, tokenizer)
        num_tokens = count_tokens(trainer)
    held_out = _read(job["held_out"])[: job["num_answers"]]
    with _clock(seconds, "answers_before"), trainer.model.disable_adapter():
        before = answer(job, trainer.model, tokenizer, held_out)
    with _clock(seconds, "train"):
        outcome = trainer.train()
    with _clock(seconds, "merge"):
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(job["output"])
        tokenizer.save_pretrained(job["output"])
    with _clock(seconds, "answers_after"):
        after = answer(job, merged, tokenizer, held_out)
    import torch

    result = {
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "final_loss": outcome.training_loss,
        "num_tokens": num_tokens * job["num_epochs"],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else None,
        "answers": [len(before), len(after)],
        "attention": job["attention"],
        "liger": job["liger"],
    }
    print("RESULT", json.dumps(result), flush=True)


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    """Load model and tokenizer, and note which of the faster ways there are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = torch.cuda.is_available()
    job["liger"] = on_gpu and find_spec("liger_kernel") is not None
    job["attention"] = "flash_attention_2" if on_gpu and find_spec("flash_attn") is not None else "sdpa"
    options: dict[str, Any] = {"device_map": {"": 0}} if on_gpu else {}
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        attn_implementation=job["attention"],
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def build_trainer(job: dict[str, Any], model: Any, tokenizer: Any) -> Any:
    """Build SFTTrainer, which tokenizes the rows."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    settings = {
        "output_dir": job["output"] + "-trainer",
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "num_train_epochs": job["num_epochs"],
        "max_steps": job["max_steps"] or -1,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        # Without padding TRL enforces no length; the job's rows are short enough.
        "max_length": None if job["attention"] == "flash_attention_2" else job["max_length"],
        "padding_free": job["attention"] == "flash_attention_2",
        "completion_only_loss": True,
        "gradient_checkpointing": False,
        "use_liger_kernel": job["liger"],
        "bf16": job["attention"] != "sdpa" or _has_gpu(),
        "use_cpu": not _has_gpu(),
        "dataloader_num_workers": 2 if _has_gpu() else 0,
        "dataset_num_proc": job["processes"],
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job["seed"],
    }
    known = {field.name for field in fields(SFTConfig)}
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in _read(job["train"])
    ]
    adapter = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=job["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{name: value for name, value in settings.items() if name in known}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def count_tokens(trainer: Any) -> int:
    """Return the tokens of one epoch."""
    return sum(len(ids) for ids in trainer.train_dataset["input_ids"])


def answer(job: dict[str, Any], model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[str]:
    """Answer held-out prompts greedily, many at once, those of a like length together."""
    import torch

    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = model.training
    model.eval()
    inner.set_attn_implementation("sdpa")  # padded batches gain nothing from the other
    inner.config.use_cache = True
    answers = [""] * len(prompts)
    for start in range(0, len(order), _ANSWERS_AT_ONCE):
        chosen = order[start : start + _ANSWERS_AT_ONCE]
        batch = tokenizer(
            [prompts[number] for number in chosen], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        batch.pop("token_type_ids", None)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=_has_gpu()):
            output = model.generate(
                **batch,
                max_new_tokens=job["max_new_tokens"],
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in zip(chosen, texts, strict=True):
            answers[number] = text
    inner.set_attn_implementation(job["attention"])
    tokenizer.padding_side = side
    model.train(was_training)
    return answers


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _read(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if _has_gpu():
        import torch

        torch.cuda.synchronize()
    seconds[stage] = round(time.perf_counter() - began, 2)
    print(f"{stage}: {seconds[stage]:.1f} s, {time.perf_counter() - _BEGAN:.1f} s since the start", flush=True)


if __name__ == "__main__":
    main()
