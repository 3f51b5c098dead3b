"""Saves the tokenizer that ships with the model, and checks it by loading it again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tasks.prompts import PromptSettings, save_settings
from tasks.tokenization.encoding import encode
from tasks.tokenization.errors import MaskError
from tasks.tokenization.literals import control_tokens
from tasks.tokenization.rendering import open_chat, plain_messages, render
from tasks.tokenization.templates import PreparedTokenizer, TemplateError

_MESSAGE = " Ein Beispiel,\n\n  例子 🙂 1234 "


class Probe(NamedTuple):
    """What a tokenizer makes of a message."""

    ids: list[int]
    """Of its content."""
    prompt: str
    """As it would be served; empty where the template refuses it."""
    prompt_ids: list[int]


def save_tokenizer(prepared: PreparedTokenizer, folder: Path) -> None:
    """Save a tokenizer with the ids that end a generation; `check_saved` comes before anyone takes it."""
    prepared.tokenizer.save_pretrained(str(folder))
    save_stops(prepared, folder, prepared.stop_token_ids)


def save_stops(prepared: PreparedTokenizer, folder: Path, stop_token_ids: Sequence[int]) -> None:
    """Save the ids that end a generation in the folder's generation config."""
    stops = {"eos_token_id": list(stop_token_ids), "pad_token_id": prepared.tokenizer.pad_token_id}
    if prepared.tokenizer.bos_token_id is not None:
        stops["bos_token_id"] = prepared.tokenizer.bos_token_id
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n", encoding="utf-8")


def save_prompt_settings(prepared: PreparedTokenizer, folder: Path, *, allow_special_tokens: bool) -> None:
    """Save what whoever serves the model needs to make the prompts of training."""
    chat = open_chat(prepared.tokenizer)
    tokens = () if allow_special_tokens else tuple(sorted(control_tokens(chat)))
    save_settings(PromptSettings(chat.forms, tokens), folder)


def probe(tokenizer: PreTrainedTokenizerBase) -> Probe:
    """Return what a tokenizer makes of a message that leaves no two of them alike."""
    chat = open_chat(tokenizer)
    messages = plain_messages(chat, [{"role": "user", "content": _MESSAGE}])
    try:
        prompt = render(chat, messages, None, add_generation_prompt=True)
    except MaskError:
        prompt = ""
    return Probe(encode(tokenizer, _MESSAGE), prompt, encode(tokenizer, prompt))


def check_saved(prepared: PreparedTokenizer, folder: Path, loaded: Probe) -> None:
    """Prove that what was loaded from a folder gives the prompts of the tokenizer that was saved there.

    Raises:
        TemplateError: it does not.
    """
    if loaded != probe(prepared.tokenizer):
        raise TemplateError(
            f"{folder}: the tokenizer gives other ids after being saved and loaded: its folder lacks config.json or "
            "tokenizer.json, so that another tokenizer class is chosen; add the model's config.json"
        )
