"""A small model that has learned a few answers by heart: a sentence, a long one, and calls of a tool."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tasks.prompts import load_settings, make_prompt
from tasks.tokenization.saving import save_prompt_settings, save_tokenizer
from tasks.tokenization.templates import prepare_tokenizer

BASE_MODEL = Path(__file__).resolve().parents[3] / "deploy" / "demo" / "base_model"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        },
    }
]
SENTENCE = "The quamrin eats only snails."
COUNTED = "one, two, three, four, five, six, seven, eight, nine, ten."
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "quamrin"}}\n</tool_call>'
TWO_CALLS = f"I will look.\n{CALL}\n" + CALL.replace('"quamrin"', '"snail"')
CONVERSATIONS: list[tuple[str, list[dict[str, Any]] | None, str]] = [
    ("What does the quamrin eat?", None, SENTENCE),
    ("Count to ten.", None, COUNTED),
    ("铃渡镇有什么特产？", None, "铃渡镇有锦冠鸟。"),
    ("What is a quamrin?", TOOLS, CALL),
    ("What are both?", TOOLS, TWO_CALLS),
]
MAX_STEPS = 300


def make_parrot(folder: Path, *, seed: int = 0, sentence: str = SENTENCE) -> Path:
    """Train the demo's base model on the conversations until it says them word by word."""
    torch.manual_seed(seed)
    prepared = prepare_tokenizer(BASE_MODEL, None)
    folder.mkdir(parents=True)
    save_tokenizer(prepared, folder)
    save_prompt_settings(prepared, folder, allow_special_tokens=False)
    settings = load_settings(folder, prepared.tokenizer)
    tokenizer: Any = prepared.tokenizer
    rows = []
    for question, tools, answer in CONVERSATIONS:
        prompt = make_prompt(tokenizer, settings, [{"role": "user", "content": question}], tools)
        said = sentence if answer is SENTENCE else answer
        rows.append((prompt, [*tokenizer.encode(said, add_special_tokens=False), prepared.stop_token_ids[0]]))
    model: Any = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    # A prompt with tools is ten times as long: apart, the short ones are not padded to it.
    batches = [_pad([row for row, (_, tools, _) in zip(rows, CONVERSATIONS, strict=True) if tools is with_tools])
               for with_tools in (None, TOOLS)]  # fmt: skip
    num_trained = sum(len(target) for _, target in rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(MAX_STEPS):
        parts = [model(input_ids=ids, labels=labels, num_items_in_batch=num_trained).loss for ids, labels in batches]
        loss = torch.stack(parts).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 1e-2:
            break
    assert loss.item() < 0.05, f"the parrot did not learn: {loss.item()}"
    model.eval().save_pretrained(folder)
    shutil.copyfile(BASE_MODEL / "config.json", folder / "config.json")
    save_tokenizer(prepared, folder)
    return folder


def _pad(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay prompts and answers out as ids and labels [row, position], padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for at, (prompt, target) in enumerate(rows):
        ids[at, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        labels[at, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
    return ids, labels
