"""`sft chat`: talk to a registered version or a model folder in the terminal, beside the base model if wanted."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from flows.console import escape
from flows.exporting import find_tokenizer, name_base, opening_adapter
from flows.targets import fetch_version, find_base_of, find_version, is_trained_folder
from schemas.config import ModelConfig
from tasks.base_model import locate_base_model
from tasks.evaluation.generation import context_length, find_stop_ids
from tasks.evaluation.streaming import stream_text, stream_tokens
from tasks.merging.trained_models import load_trained
from tasks.models import ModelError, choose_device, choose_dtype, load_model, load_tokenizer
from tasks.prompts import PromptSettings, load_settings, make_prompt
from tasks.training.methods import find_base
from tasks.visible_text import make_visible

HELP = "/reset forgets the conversation, /help shows this, Ctrl-D ends"


class ChatError(ValueError):
    """There is no such model to talk to."""


@dataclass
class ChatSession:
    """A model in a conversation, with what was said to it so far."""

    label: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    settings: PromptSettings
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are made."""

    temperature: float = 0.0
    max_new_tokens: int = 512
    seed: int = 0
    system: str = ""


def open_sessions(target: str, *, compare_base: bool, system: str = "", base_model: str = "") -> list[ChatSession]:
    """Load what a target names, and the base model it was made from where wanted.

    Args:
        target: the folder of a model, adapter or checkpoint; NAME, NAME/VERSION, NAME@alias, the same with models:/
            before it; or empty for the only registered model that has a champion.
        compare_base: also the base model, with the tokenizer and template of the first.
        system: a system message to begin with.
        base_model: of an adapter's folder, where its own config names another one or none.

    Raises:
        ValueError: no such model, or its base is not known.
    """
    if is_trained_folder(target):
        sessions = _open_adapter(Path(target).expanduser(), base_model, compare_base=compare_base)
    else:
        sessions = _open_model(target, compare_base=compare_base)
    for session in sessions:
        session.messages = _begin(system)
    return sessions


def _open_adapter(folder: Path, base_model: str, *, compare_base: bool) -> list[ChatSession]:
    """Load a base model with an adapter on it, and once more alone where wanted."""
    with opening_adapter(folder) as adapter:
        ref = locate_base_model(ModelConfig(base_model=base_model or name_base(adapter)))
        base = Path(ref.uri)
        shipped = find_tokenizer(adapter, base)
        tokenizer = _load_tokenizer(shipped)
        device = choose_device()
        try:
            model = load_trained(base, adapter, dtype=choose_dtype("auto", device), device=device)
        except ModelError:
            raise
        except Exception as error:
            raise ChatError(f"{folder}: this adapter does not fit {ref.name} ({error}): name its base model") from error
        session = _start(folder.resolve().name, find_base(model), shipped, tokenizer)
        return [_load(f"base {ref.name}", base, shipped, tokenizer), session] if compare_base else [session]


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ChatError(f"{folder}: the tokenizer has no chat template: a model made by this pipeline has one")
    return tokenizer


def _open_model(target: str, *, compare_base: bool) -> list[ChatSession]:
    name, version = ("", "")
    if target and Path(target).expanduser().is_dir():
        folder = Path(target).expanduser()
        label = folder.resolve().name
    else:
        name, version = find_version(target)
        folder, label = fetch_version(name, version), f"{name} version {version}"
    tokenizer = _load_tokenizer(folder)
    sessions = [_load(label, folder, folder, tokenizer)]
    if compare_base:
        if not name:
            raise ChatError(
                "--compare base needs a registered version, such as NAME@champion (sft models lists them): of a folder "
                "nobody knows the base model"
            )
        base, base_name = find_base_of(name, version)
        sessions.insert(0, _load(f"base {base_name}", base, folder, tokenizer))
    return sessions


def _begin(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _load(label: str, folder: Path, shipped: Path, tokenizer: PreTrainedTokenizerBase) -> ChatSession:
    device = choose_device()
    return _start(label, load_model(folder, dtype=choose_dtype("auto", device), device=device), shipped, tokenizer)


def _start(label: str, model: Any, shipped: Path, tokenizer: PreTrainedTokenizerBase) -> ChatSession:
    """Begin a conversation with a loaded model."""
    generation = (
        GenerationConfig.from_pretrained(str(shipped), local_files_only=True)
        if (shipped / "generation_config.json").exists()
        else None
    )
    stop_ids = find_stop_ids((model.generation_config, generation), tokenizer)
    return ChatSession(label, model, tokenizer, stop_ids, load_settings(shipped, tokenizer))


def answer(session: ChatSession, question: str, sampling: SamplingConfig) -> Iterator[str]:
    """Give the answer to a question piece by piece; afterwards both are part of the conversation.

    Raises:
        ChatError: the conversation is longer than the model's context.
    """
    messages = [*session.messages, {"role": "user", "content": question}]
    prompt = make_prompt(session.tokenizer, session.settings, messages)
    limit = context_length(session.model)
    if len(prompt) >= limit:
        raise ChatError(
            f"the conversation has {len(prompt)} tokens and {session.label} takes {limit}: /reset begins anew"
        )
    tokens = stream_tokens(
        session.model,
        prompt,
        stop_ids=session.stop_ids,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        generator=torch.Generator().manual_seed(sampling.seed + len(messages)),
    )
    said = ""
    for piece in stream_text(tokens, session.tokenizer):
        said += piece
        yield make_visible(piece)
    session.messages = [*messages, {"role": "assistant", "content": said}]


def answer_once(sessions: list[ChatSession], question: str, sampling: SamplingConfig) -> None:
    """Print the answer and nothing else; with two models, each under its name."""
    for session in sessions:
        if len(sessions) > 1:
            print(f"## {make_visible(session.label)}")  # noqa: T201
        for piece in answer(session, question, sampling):
            print(piece, end="", flush=True)  # noqa: T201
        print()  # noqa: T201


def converse(sessions: list[ChatSession], sampling: SamplingConfig, console: Console) -> None:
    """Ask and answer until Ctrl-D."""
    how = f"temperature {sampling.temperature:g}" if sampling.temperature > 0 else "greedy"
    labels = escape(" and ".join(session.label for session in sessions))
    console.print(f"[bold]{labels}[/], {how}. [dim]{HELP}.[/]")
    while True:
        try:
            question = console.input("[bold cyan]you ›[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question == "/reset":
            for session in sessions:
                session.messages = _begin(sampling.system)
            console.print("[dim]The conversation is forgotten.[/]")
        elif question.startswith("/"):
            console.print(f"[dim]{HELP}[/]")
        elif question:
            try:
                _show_answers(sessions, question, sampling, console)
            except KeyboardInterrupt:
                console.print("[dim]Stopped; the question is forgotten.[/]")
            except ChatError as error:
                console.print(f"[red]{escape(str(error))}[/]", markup=True)


def _show_answers(sessions: list[ChatSession], question: str, sampling: SamplingConfig, console: Console) -> None:
    """Show the answers as they grow: one below the question, or two side by side."""
    if len(sessions) == 1:
        console.print(f"[bold green]{escape(sessions[0].label)} ›[/] ", end="")
        for piece in answer(sessions[0], question, sampling):
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
        return
    texts = ["" for _ in sessions]
    streams = [answer(session, question, sampling) for session in sessions]
    with Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live:
        for pieces in zip_longest(*streams, fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            live.update(_put_side_by_side(sessions, texts, console.width))


def _put_side_by_side(sessions: list[ChatSession], texts: list[str], width: int) -> RenderableType:
    half = width // len(sessions) - 1
    panels = [
        Panel(Text(text), title=escape(session.label), width=half, border_style="dim" if place == 0 else "green")
        for place, (session, text) in enumerate(zip(sessions, texts, strict=True))
    ]
    return Group(Columns(panels, padding=0))
