"""A model that is being served: its weights in an engine, its prompts, its names."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tasks.evaluation.flat import UnsupportedModelError
from tasks.evaluation.generation import context_length, find_stop_ids
from tasks.evaluation.slots import check_slots
from tasks.models import ModelError
from tasks.prompts import PromptSettings, load_settings, normalize_messages
from tasks.serving.call_syntax import CallSyntax, learn_syntax
from tasks.serving.engine import AnswerEngine
from tasks.serving.lanes import CohortLanes, Lanes, SlotLanes

FEW_ROWS = 4
"""Rows that have to fit with their whole context before a row's length is cut."""
NUM_ROWS = {"cuda": 64, "cpu": 16}
"""Rows that are answered at once where nothing else is asked for."""


@dataclass
class ServedModel:
    """What the application needs to answer."""

    names: tuple[str, ...]
    """That requests may call it by; the first is the one that is listed."""
    tokenizer: PreTrainedTokenizerBase
    settings: PromptSettings
    engine: AnswerEngine
    length: int
    """Most tokens of a row, prompt and answer."""
    syntax: CallSyntax | None
    temperature: float = 0.0
    """Where a request names none."""
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    """What a person should know, a sentence each."""
    started: int = field(default_factory=lambda: int(time.time()))
    _spelled: dict[int, tuple[str, list[int]]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return the entry of /v1/models."""
        entry = {"id": self.names[0], "object": "model", "created": self.started, "owned_by": "sft-pipeline"}
        return {**entry, "aliases": list(self.names[1:]), "max_model_len": self.length}

    def spell(self, token: int) -> tuple[str, list[int]]:
        """Return a token's text and its bytes in UTF-8; special tokens are written out."""
        if token not in self._spelled:
            text = str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
            self._spelled[token] = text, list(text.encode())
        return self._spelled[token]

    def close(self) -> None:
        """End the engine."""
        self.engine.close()


def open_served(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    names: tuple[str, ...],
    num_rows: int | None = None,
    length: int | None = None,
    temperature: float = 0.0,
    fingerprint: str = "",
) -> ServedModel:
    """Start an engine for a loaded model.

    Args:
        model: in eval mode; nobody else may use it any more.
        tokenizer: with a chat template.
        folder: beside which the tokenizer's settings and generation config lie.
        names: see ServedModel.
        num_rows: answered at once; None for 64 on a GPU, 16 on a CPU, or as many as fit.
        length: most tokens of a row; None for the model's context, or what fits for four rows.
        temperature: see ServedModel.
        fingerprint: of what is served.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"{folder}: the tokenizer has no chat template: a model made by this pipeline has one")
    config_file = folder / "generation_config.json"
    shipped = GenerationConfig.from_pretrained(str(folder), local_files_only=True) if config_file.exists() else None
    stop_ids = find_stop_ids((model.generation_config, shipped), tokenizer)
    settings = load_settings(folder, tokenizer)
    lanes, fitted, notes = _open_lanes(model, num_rows, length)
    syntax = learn_syntax(make_render(tokenizer, settings))
    if syntax is None:
        notes += ("the chat template writes no calls of tools that could be read back: calls stay text",)
    return ServedModel(
        names=names,
        tokenizer=tokenizer,
        settings=settings,
        engine=AnswerEngine(lanes, stop_ids),
        length=fitted,
        syntax=syntax,
        temperature=temperature,
        fingerprint=fingerprint,
        notes=notes,
    )


def _open_lanes(model: PreTrainedModel, num_rows: int | None, length: int | None) -> tuple[Lanes, int, tuple[str, ...]]:
    """Return lanes, the length of their rows, and notes."""
    wanted = min(length or context_length(model), context_length(model))
    rows = num_rows or NUM_ROWS.get(model.device.type, NUM_ROWS["cpu"])
    try:
        bytes_per_token = check_slots(model)
    except UnsupportedModelError as error:
        told = f"rows are answered in padded batches, those that come together together: {error}"
        return CohortLanes(model, num_rows=rows), wanted, (told,)
    fitting = _free_bytes(model.device) // 2 // bytes_per_token
    notes: tuple[str, ...] = ()
    if wanted * min(rows, FEW_ROWS) > fitting:
        cut = max(fitting // min(rows, FEW_ROWS), 1)
        notes = (f"a row takes {cut} tokens in place of {wanted}: more do not fit into half of the free memory",)
        wanted = cut
    rows = max(1, min(rows, fitting // wanted))
    return SlotLanes(model, num_slots=rows, slot_length=wanted), wanted, notes


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)


def make_render(tokenizer: PreTrainedTokenizerBase, settings: PromptSettings) -> Any:
    """Return a function that renders messages and tools, with or without the generation prompt."""

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]], with_prompt: bool) -> str:
        plain = normalize_messages(messages, settings.forms)
        given: list[Any] = list(tools)
        text: Any = tokenizer.apply_chat_template(plain, tools=given, add_generation_prompt=with_prompt, tokenize=False)
        return str(text)

    return render
