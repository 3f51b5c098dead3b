"""Losses of direct preference optimization beside TRL's, step by step, on the demo's model in fp32 on the CPU.

    PYTHONPATH=.:PATH_OF_TRL python -m tests.benchmarks.preferences [--steps 12]

Both train the same adapter from the same start on the same pairs in the same order. The last line is a JSON object.
"""

import argparse
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.config import DpoConfig, TrainingConfig
from tasks.models import load_model
from tasks.training.loop import train_adapter
from tasks.training.lora import attach_adapter, save_adapter
from tasks.training.micro_batches import iterate_steps
from tasks.training.preparation import prepare_training
from tasks.training.records import StepRecord

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy" / "demo" / "base_model"
LIMIT = 1e-4


def main() -> None:
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--loss", choices=("sigmoid", "hinge", "ipo"), default="sigmoid")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    config = TrainingConfig(
        objective="dpo", dpo=DpoConfig(loss=options.loss), rank=16, alpha=32, learning_rate=1e-3, micro_batch=8,
        scheduler="constant", warmup_fraction=0.0, num_epochs=100, max_steps=options.steps, precision="fp32",
    )  # fmt: skip
    with TemporaryDirectory() as place:
        tokens = write_tokens(Path(place) / "tokens", options.pairs)
        ours = train_ours(Path(place), tokens, config)
        theirs = train_theirs(Path(place), tokens, config)
    differences = [abs(mine - other) for mine, other in zip(ours, theirs, strict=True)]
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        print(f"step {step:3d}   ours {mine:.6f}   TRL {other:.6f}   {mine - other:+.1e}")
    met = max(differences) <= LIMIT
    print(json.dumps({"loss": options.loss, "largest_difference": max(differences), "limit": LIMIT, "met": met}))


def write_tokens(folder: Path, number: int) -> Path:
    """Write pairs of the demo as a tokens folder: text with an end behind each answer, no template."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = (ROOT / "deploy" / "demo" / "data" / "heldout-pairs.jsonl").read_text(encoding="utf-8").splitlines()
    table: dict[str, list[Any]] = {"example_id": [f"pair-{place}" for place in range(number)]}
    columns = (("chosen", "input_ids", "labels"), ("rejected", "rejected_ids", "rejected_labels"))
    for line in lines[:number]:
        row = json.loads(line)
        prompt = tokenizer.encode(row["prompt"] + "\n")
        for name, ids, labels in columns:
            answer = [*tokenizer.encode(row[name]), tokenizer.eos_token_id]
            table.setdefault(ids, []).append(prompt + answer)
            table.setdefault(labels, []).append([-100] * len(prompt) + answer)
    kind = pa.list_(pa.int32())
    folder.mkdir()
    arrays = {name: values if name == "example_id" else pa.array(values, kind) for name, values in table.items()}
    pq.write_table(pa.table(arrays), folder / "train.parquet")
    return folder


def train_ours(place: Path, tokens: Path, config: TrainingConfig) -> list[float]:
    """Return the loss of each step."""
    records: list[StepRecord] = []
    train_adapter(MODEL, tokens, place / "run", config, seed=0, identity="x", on_step=records.append)
    return [record.loss for record in records]


def train_theirs(place: Path, tokens: Path, config: TrainingConfig) -> list[float]:
    """Return the loss of each step of TRL's trainer, which sees the pairs in our order."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found,unused-ignore]

    adapted = attach_adapter(load_model(MODEL, dtype=torch.float32), config, seed=0)
    save_adapter(adapted, place / "start")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    settings = DPOConfig(
        output_dir=str(place / "trl"), per_device_train_batch_size=config.micro_batch, max_steps=config.max_steps,
        learning_rate=config.learning_rate, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=config.max_grad_norm, beta=config.dpo.beta, loss_type=[config.dpo.loss], logging_steps=1,
        precompute_ref_log_probs=True, save_strategy="no", report_to="none", bf16=False, fp16=False, use_cpu=True,
        gradient_checkpointing=False, max_length=None,
    )  # fmt: skip

    class Trainer(DPOTrainer):  # type: ignore[misc,unused-ignore]
        def _prepare_dataset(self, dataset: Any, *arguments: Any, **further: Any) -> Any:
            return dataset  # has ids already

        def _get_train_sampler(self, *arguments: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    trainer = Trainer(
        model=PeftModel.from_pretrained(model, str(place / "start"), is_trainable=True), args=settings,
        train_dataset=Dataset.from_list(list_rows(place, tokens, config)),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
    )  # fmt: skip
    losses: list[float] = []
    compute = trainer.compute_loss

    def noting(*arguments: Any, **further: Any) -> Any:
        found = compute(*arguments, **further)
        losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
        return found

    trainer.compute_loss = noting
    trainer.train()
    return losses


def list_rows(place: Path, tokens: Path, config: TrainingConfig) -> list[dict[str, list[int]]]:
    """Return the pairs of all steps, in the order in which we train them."""
    setup = prepare_training(MODEL, tokens, place / "examples", config, seed=0)
    assert config.max_steps is not None
    rows: list[dict[str, list[int]]] = []
    steps: dict[str, Any] = {"first": 0, "last": config.max_steps, "form_step": setup.engine.form_step}
    for batches in iterate_steps(setup.table, setup.rows, config, seed=0, **steps):
        names = sorted({index for batch in batches for index in batch.indices})
        assert len(names) == 2 * config.micro_batch, "a step is cut short: choose pairs that divide into steps"
        for chosen, rejected in zip(names[::2], names[1::2], strict=True):
            places = [slice(*setup.table.offsets[index : index + 2]) for index in (chosen, rejected)]
            ids = [setup.table.input_ids[place].tolist() for place in places]
            prompt = len(ids[0]) - int((setup.table.targets[places[0]] >= 0).sum())
            rows.append({"prompt_ids": ids[0][:prompt], "chosen_ids": ids[0][prompt:], "rejected_ids": ids[1][prompt:]})
    return rows


if __name__ == "__main__":
    main()
