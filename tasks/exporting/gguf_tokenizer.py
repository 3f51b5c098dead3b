"""A tokenizer as GGUF has it: byte-level BPE, with the name of the rule that cuts text into words.

llama.cpp knows these rules by name and not by their expression, so that one that it does not know cannot be written.
"""

import json
from pathlib import Path
from typing import Any

import gguf

from tasks.exporting.errors import ExportError

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
RULES = {_QWEN2: "qwen2", _LLAMA3: "llama-bpe", "": "gpt-2"}
"""llama.cpp's name of a rule; the empty one is ByteLevel's own."""


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, *, num_rows: int, stops: tuple[int, ...]) -> None:
    """Write vocabulary, merges, kinds of tokens, ends of a turn and the chat template.

    Args:
        writer: gets them.
        folder: of the model, with tokenizer.json.
        num_rows: of the embedding; those beyond the vocabulary get names of their own.
        stops: ids that end a generation, the end of a turn first.

    Raises:
        ExportError: the tokenizer is of another kind, or there are more ends than places.
    """
    values = _read(folder)
    model = values["model"]
    names: dict[int, tuple[str, gguf.TokenType]] = {
        number: (text, gguf.TokenType.NORMAL) for text, number in model["vocab"].items()
    }
    for token in values.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        names[token["id"]] = (token["content"], kind)
    if max(names) >= num_rows:
        raise ExportError(f"{folder}: the tokenizer has ids up to {max(names)}, the embedding {num_rows} rows")
    listed = [names.get(number, (f"[PAD{number}]", gguf.TokenType.UNUSED)) for number in range(num_rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_rule(values, folder))
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    if len(stops) > len(ends):
        raise ExportError(
            f"{folder}: generation_config.json names {len(stops)} tokens that end an answer; a GGUF file has places "
            f"for {len(ends)}, and llama.cpp would talk on after the others"
        )
    for add, stop in zip(ends, stops, strict=False):
        add(stop)
    _add_settings(writer, folder, {text: number for number, (text, _) in names.items()})


def read_template(folder: Path) -> str:
    """Return the chat template of a model's folder; empty where there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_settings(folder).get("chat_template")
    return template if isinstance(template, str) else ""


def _add_settings(writer: gguf.GGUFWriter, folder: Path, ids: dict[str, int]) -> None:
    settings = _read_settings(folder)
    for name, add in (("pad_token", writer.add_pad_token_id), ("bos_token", writer.add_bos_token_id)):
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            add(ids[text])
    writer.add_add_bos_token(_begins_with_bos(folder))
    if template := read_template(folder):
        writer.add_chat_template(template)


def _begins_with_bos(folder: Path) -> bool:
    from tasks.models import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _name_rule(values: dict[str, Any], folder: Path) -> str:
    found = values.get("pre_tokenizer") or {}
    parts = found["pretokenizers"] if found.get("type") == "Sequence" else [found]
    kinds = [part.get("type") for part in parts]
    if kinds == ["Split", "ByteLevel"]:
        rule = str(parts[0]["pattern"].get("Regex"))
    elif kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        rule = ""
    else:
        rule = None
    if rule not in RULES:
        raise ExportError(
            f"{folder}: its tokenizer cuts words by a rule that llama.cpp has no name for here "
            f"({', '.join(map(str, kinds))}); known are those of {', '.join(RULES.values())}"
        )
    return RULES[rule]


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = values.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ExportError(f"{file}: a byte-level BPE is what is written as GGUF here; this is {model.get('type')}")
    return values


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return values
