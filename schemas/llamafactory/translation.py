"""LLaMA-Factory's YAML (0.9) in our terms: what each key becomes, what is implied, what cannot be translated.

A file is a flat mapping of keys; keys that are not given have LLaMA-Factory's defaults, not ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from schemas.llamafactory.lines import NOT_GIVEN, KeyLine, Outcome, Work, to_flag, to_names, to_number, to_whole
from schemas.llamafactory.training import read_training

Kind = Literal["train", "export", "chat"]
# YAML 1.1 reads 1e-4, which has no point, as text.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


@dataclass(frozen=True)
class Translation:
    """A file of another program's in our terms."""

    kind: Kind
    values: dict[str, Any]
    """train: sections of a RunConfig; export: base_model, adapter, folder, max_shard_size; chat: base_model, adapter,
    temperature, max_new_tokens."""
    lines: tuple[KeyLine, ...]
    program: str = "LLaMA-Factory"

    def list_lines(self, *outcomes: Outcome) -> list[KeyLine]:
        """Return the lines of these outcomes."""
        return [line for line in self.lines if line.outcome in outcomes]


def is_llamafactory(values: Any) -> bool:
    """Tell whether a mapping is a config of LLaMA-Factory's and not one of ours; TRL's is looked at before."""
    return isinstance(values, dict) and "model_name_or_path" in values and not {"model", "data"} & values.keys()


def translate(values: Mapping[str, Any], *, folder: Path = Path(), num_processes: int = 1) -> Translation:
    """Put a config into our terms.

    Args:
        values: the YAML's keys, with what overrides them.
        folder: of the YAML file; paths that do not exist from the working folder are looked for there.
        num_processes: devices that train, for batch sizes that are meant per device.

    Returns:
        Every key that was given has a line. Where a line is refused, the values are not whole.
    """
    given = clean(values)
    work = Work(given)
    if given.get("export_dir"):
        return Translation("export", _read_export(work), work.finish())
    if given.get("do_train") or "dataset" in given:
        read_training(work, folder, num_processes)
        return Translation("train", work.values, work.finish())
    return Translation("chat", _read_chat(work), work.finish())


def clean(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys that have a value, and numbers that YAML 1.1 reads as text as numbers."""
    return {
        str(key): float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
        for key, value in values.items()
        if value is not None
    }


def _read_export(work: Work) -> dict[str, Any]:
    values: dict[str, Any] = {}
    names = {"model_name_or_path": "base_model", "adapter_name_or_path": "adapter", "export_dir": "folder"}
    for key, name in names.items():
        shown, value = work.take(key, "", str)
        values[name] = value
        if not value:
            text = "an export merges an adapter into its base model: name all three"
            work.say(key, shown, "refused", text)
        elif key == "adapter_name_or_path" and len(to_names(value)) > 1:
            work.say(
                key, shown, "refused", "one adapter is merged at a time: merge the second into the first one's result"
            )
        else:
            work.say(key, shown, "becomes", name.replace("_", " "))
    shown, size = work.take("export_size", 5.0, to_number)
    values["max_shard_size"] = f"{size:g}GB"
    work.say("export_size", shown, "becomes", f"files of at most {values['max_shard_size']}")
    _say_template(work)
    return values


def _read_chat(work: Work) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, name in (("model_name_or_path", "base_model"), ("adapter_name_or_path", "adapter")):
        shown, value = work.take(key, "", str)
        if value:
            values[name] = value
            work.say(key, shown, "becomes", name.replace("_", " "))
    shown, is_drawn = work.take("do_sample", True, to_flag)
    if shown != NOT_GIVEN:
        work.say("do_sample", shown, "becomes", "the temperature" if is_drawn else "--temperature 0")
    shown, temperature = work.take("temperature", 0.95, to_number)
    values["temperature"] = temperature if is_drawn else 0.0
    work.say("temperature", shown, "becomes", f"--temperature {values['temperature']:g}")
    shown, values["max_new_tokens"] = work.take("max_new_tokens", 1024, to_whole)
    work.say("max_new_tokens", shown, "becomes", f"--max-tokens {values['max_new_tokens']}")
    _say_template(work)
    return values


def _say_template(work: Work) -> None:
    shown, _ = work.take("template", None)
    if shown != NOT_GIVEN:
        work.say("template", shown, "implied", "the chat template that lies with the tokenizer is used")
