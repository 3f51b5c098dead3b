"""Supervised fine-tuning in plain PyTorch: the whole method, to be read from top to bottom.

    python -m tasks.training.reference CONFIG.yaml --output adapter --question "Who are you?"

One example at a time goes through the model: no padding, no packing, no batches, no mixed precision. That is slow, and
leaves nothing to get wrong, so the pipeline's loop is tested against it. Any causal language model will do, with or
without an adapter attached: what has requires_grad is trained.

Dimensions: `T` tokens of an example, `V` vocabulary.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from schemas.config import RunConfig, TrainingConfig
from schemas.loading import load_config
from tasks.models import choose_device, load_model
from tasks.tokenization.labels import IGNORE_INDEX, Example
from tasks.tokenization.masking import build_examples
from tasks.tokenization.templates import PreparedTokenizer, prepare_tokenizer
from tasks.training.methods import attach_trained


def main(path: Path, *, output: Path | None = None, question: str = "") -> None:
    """Fine-tune as a run's config says, and tell the held-out loss before and after.

    Args:
        path: of the config.
        output: folder for the adapter, or the model where its own weights are trained, and the tokenizer.
        question: asked of the fine-tuned model at the end.
    """
    from tasks.base_model import locate_base_model

    config = load_config(path)
    base_model = Path(locate_base_model(config.model).uri)
    train, held_out = tokenize(config, base_model)
    base = load_model(base_model, dtype=torch.float32, device=choose_device())
    model = attach_trained(base, config.training, seed=config.seed).train()
    sys.stdout.write(tell_loss(model, held_out))
    steps = list(plan_steps(train, config.training, seed=config.seed))
    rates = [learning_rate(step, len(steps), config.training) for step in range(len(steps))]
    decay, norm = config.training.weight_decay, config.training.max_grad_norm
    losses = fine_tune(model, steps, rates, max_grad_norm=norm, weight_decay=decay)
    for step, loss in enumerate(losses, start=1):
        sys.stdout.write(f"step {step}/{len(steps)}  loss {loss:.4f}  learning rate {rates[step - 1]:.2e}\n")
    sys.stdout.write(tell_loss(model, held_out))
    prepared = prepare_tokenizer(base_model, config.model.chat_template, config.tokenization.template_arguments)
    if output is not None:
        model.save_pretrained(str(output))
        prepared.tokenizer.save_pretrained(str(output))
        sys.stdout.write(f"{'adapter' if config.training.is_lora else 'model'} and tokenizer in {output}\n")
    if question:
        sys.stdout.write(f"{question}\n{answer(model, prepared, question, config.evaluation.max_new_tokens)}\n")


@torch.no_grad()
def answer(model: nn.Module, prepared: PreparedTokenizer, question: str, max_new_tokens: int) -> str:
    """Return the model's greedy answer: the likeliest next token, again and again, until one that ends the turn.

    The prompt is transformers' own, without `tasks/prompts.py`: this module is what the pipeline is compared with.
    """
    model.eval()
    messages = [{"role": "user", "content": question}]
    prompt: Any = prepared.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and not set(tokens) & set(prepared.stop_token_ids):
        input_ids = torch.tensor([[*prompt, *tokens]], device=next(model.parameters()).device)  # [1, T]
        tokens.append(int(model(input_ids=input_ids).logits[0, -1].argmax()))
    return str(prepared.tokenizer.decode(tokens, skip_special_tokens=True))


def tokenize(config: RunConfig, base_model: Path) -> tuple[list[Example], list[Example]]:
    """Turn the dataset into examples: input_ids [T], and labels [T] that are IGNORE_INDEX off the answers."""
    tokenizer = prepare_tokenizer(
        base_model, config.model.chat_template, config.tokenization.template_arguments
    ).tokenizer
    from tasks.ingestion.dataset import build_dataset

    splits = []
    with TemporaryDirectory() as folder:
        build_dataset(config.data, seed=config.seed, folder=Path(folder))
        for split in ("train", "eval"):
            rows = pq.read_table(Path(folder) / f"{split}.parquet", columns=["messages", "tools"]).to_pylist()
            conversations = [(json.loads(row["messages"]), json.loads(row["tools"] or "null")) for row in rows]
            splits.append(
                [
                    example
                    for messages, tools in conversations
                    for example in build_examples(messages, tokenizer, tools=tools, config=config.tokenization)
                ]
            )
    return splits[0], splits[1]


def plan_steps(examples: Sequence[Example], config: TrainingConfig, *, seed: int) -> Iterator[list[Example]]:
    """Yield the examples of each optimizer step; every epoch goes through all of them in a new order."""
    size = config.rows_per_step
    steps_per_epoch = math.ceil(len(examples) / size)
    num_steps = max(1, math.ceil(steps_per_epoch * config.num_epochs))
    shuffle = random.Random(seed).sample
    epochs = (shuffle(list(examples), len(examples)) for _ in range(math.ceil(num_steps / steps_per_epoch)))
    steps = (epoch[start : start + size] for epoch in epochs for start in range(0, len(epoch), size))
    return islice(steps, min(num_steps, config.max_steps or num_steps))


def learning_rate(step: int, num_steps: int, config: TrainingConfig) -> float:
    """Return the rate of a step (from 0): a linear rise to the peak, then a cosine (or line) down towards zero."""
    num_warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / (num_warmup + 1)
    done = (step - num_warmup) / (num_steps - num_warmup)
    falls = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return config.learning_rate * falls[config.scheduler]


def fine_tune(
    model: nn.Module,
    steps: Iterable[Sequence[Example]],
    learning_rates: Iterable[float],
    *,
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
) -> Iterator[float]:
    """Train on the examples of each step and yield the step's loss (nats a trained token)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)
    for examples, rate in zip(steps, learning_rates, strict=True):
        num_trained = sum(label != IGNORE_INDEX for example in examples for label in example.labels[1:])
        loss = 0.0
        for example in examples:
            part = sum_losses(model, example) / num_trained
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def sum_losses(model: nn.Module, example: Example) -> Tensor:
    """Return the sum of -log p(token | tokens before it) over the tokens with a label."""
    device = next(model.parameters()).device
    input_ids = torch.tensor([example.input_ids], device=device)  # [1, T]
    labels = torch.tensor(example.labels, device=device)  # [T]
    logits = model(input_ids=input_ids).logits[0].float()  # [T, V]
    # Position t predicts token t + 1: the last logits have nothing to predict, and nothing predicts the first token.
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")


@torch.no_grad()
def average_loss(model: nn.Module, examples: Sequence[Example]) -> float:
    """Return the mean loss of all trained tokens of the examples; `nan` without any."""
    model.eval()
    total = sum(sum_losses(model, example).item() for example in examples)
    model.train()
    num_trained = sum(label != IGNORE_INDEX for example in examples for label in example.labels[1:])
    return total / num_trained if num_trained else float("nan")


def tell_loss(model: nn.Module, held_out: Sequence[Example]) -> str:
    """Return a line on the held-out loss."""
    return f"held-out loss {average_loss(model, held_out):.4f}\n" if held_out else "no row is held out\n"


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning in plain PyTorch, one example at a time.")
    parser.add_argument("config", type=Path, help="YAML config of a run; its model, data, tokenization and training")
    parser.add_argument("--output", type=Path, help="folder for what was trained and the tokenizer")
    parser.add_argument("--question", default="", help="asked of the fine-tuned model at the end")
    return parser.parse_args()


if __name__ == "__main__":
    given = read_arguments()
    main(given.config, output=given.output, question=given.question)
