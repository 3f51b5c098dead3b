"""Reads configs: ours, or LLaMA-Factory's, TRL's or Axolotl's, which are translated, with a line about every key."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.table import Table

from flows.console import console, escape
from schemas.config import ModelConfig, RunConfig
from schemas.foreign import name_program, translate_any
from schemas.llamafactory.lines import NOT_GIVEN, KeyLine
from schemas.llamafactory.training import is_there, name_by_folder
from schemas.llamafactory.translation import Translation
from schemas.loading import ConfigError, apply_override, override_config, read_mapping
from schemas.plurals import count_of
from tasks.visible_text import make_visible

_MAX_SHOWN = 200
"""Characters of a value."""
_COLOURS = {"becomes": "green", "implied": "dim", "not done": "yellow", "refused": "red"}


def load_any(path: Path, overrides: Iterable[str] = (), set_: Iterable[str] = ()) -> RunConfig | Translation:
    """Read a config of ours, or one of another program's, whose trainings become configs of ours.

    Args:
        path: YAML file.
        overrides: key=value, over the file's own keys.
        set_: section.field=value, over our settings.

    Raises:
        ConfigError: it cannot be used; of another program's every key that cannot be translated is named.
    """
    values = read_mapping(path)
    if not name_program(values):
        return override_config(values, (*overrides, *set_), str(path))
    translation = translate_file(path, values, overrides)
    check_usable(translation, path)
    if translation.kind != "train":
        _tell_not_done(translation)
        return translation
    config = override_config(_in_order(translation.values), tuple(set_), str(path))
    num_lines = {kind: len(translation.list_lines(kind)) for kind in ("becomes", "implied")}
    console.print(
        f"{make_visible(path.name)} is {translation.program}'s: {num_lines['becomes']} settings translated, "
        f"{num_lines['implied']} hold anyway. The table: sft import {make_visible(str(path))}",
        markup=False,
    )
    _tell_not_done(translation)
    return config


def _tell_not_done(translation: Translation) -> None:
    for line in translation.list_lines("not done"):
        console.print(f"[yellow]not done:[/] {escape(_word(line))}")


def translate_file(path: Path, values: dict[str, Any], overrides: Iterable[str] = ()) -> Translation:
    """Translate the keys of a file of another program's, with key=value over them."""
    for override in overrides:
        apply_override(values, override)
    return translate_any(values, folder=path.parent, num_processes=count_devices())


def check_usable(translation: Translation, path: Path) -> None:
    """Raise ConfigError with every key that cannot be translated."""
    refused = translation.list_lines("refused")
    if refused:
        lines = "\n".join(f"  {_word(line)}" for line in refused)
        raise ConfigError(
            f"{path}: {count_of(len(refused), 'key')} of {translation.program}'s that cannot be translated\n{lines}"
        )


def count_devices() -> int:
    """Return how many processes LLaMA-Factory would start here: NPROC_PER_NODE, or one a GPU that is visible."""
    if given := os.environ.get("NPROC_PER_NODE"):
        if not given.isdigit() or int(given) < 1:
            raise ConfigError(f"NPROC_PER_NODE = {given!r}: a number of processes from 1 is wanted")
        return int(given)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
        return max(1, int(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return 1


@dataclass(frozen=True)
class ChatTarget:
    """Whom to talk to, and how."""

    target: str
    base_model: str = ""
    """Of an adapter."""
    temperature: float = 0.0
    max_new_tokens: int = 512


def read_chat(model: str) -> ChatTarget:
    """Return what a chat YAML of LLaMA-Factory's names; anything else is a target itself.

    Raises:
        ConfigError: the YAML is none of a chat.
    """
    path = Path(model)
    with suppress(RuntimeError):  # a user that there is not
        path = path.expanduser()
    if path.suffix not in (".yaml", ".yml") or not is_there(path, as_file=True):
        return ChatTarget(model)
    values = read_mapping(path)
    translation = translate_file(path, values) if name_program(values) else None
    if translation is None or translation.kind != "chat":
        raise ConfigError(
            f"{path}: not a chat config of LLaMA-Factory's (that has model_name_or_path): name a model or a folder"
        )
    check_usable(translation, path)
    _tell_not_done(translation)
    chat = translation.values
    base_model = chat["base_model"]
    target = find_trained(chat["adapter"]) if chat.get("adapter") else _find_folder(base_model)
    return ChatTarget(target, base_model, chat["temperature"], chat["max_new_tokens"])


def find_trained(adapter: str) -> str:
    """Return the folder of an adapter; where there is none, the version that a training with this output_dir made.

    Raises:
        ConfigError: there is neither.
    """
    if Path(adapter).expanduser().exists():
        return adapter
    from tasks.registry.versions import CHAMPION, find_by_address, find_newest

    name = name_by_folder(adapter)
    version = find_newest(name) if name else None
    if version is None:
        with suppress(ValueError):
            return "/".join(find_by_address(adapter, default_alias=CHAMPION))
        registered = (
            f", and no registered model {name}, as a training with this output_dir would have made" if name else ""
        )
        raise ConfigError(
            f"adapter_name_or_path = {adapter}: there is no such folder{registered}: train first (sft run), or name "
            "the folder of an adapter, or NAME/VERSION of the registry"
        )
    console.print(f"{escape(adapter)} is what {name}/{version} was trained as: it is taken from the registry")
    return f"{name}/{version}"


def _find_folder(base_model: str) -> str:
    """Return the folder of a model, downloaded where it is one of the hub."""
    from tasks.base_model import locate_base_model

    return locate_base_model(ModelConfig(base_model=base_model)).uri


def show_translation(translation: Translation) -> None:
    """Print what became of each key, on the error stream: the config may be piped into a file."""
    table = Table(title=f"{translation.program}'s config here", title_justify="left")
    for column in ("key", "value", "", "here"):
        table.add_column(column, overflow="fold")
    order = list(_COLOURS)
    for line in sorted(translation.lines, key=lambda line: order.index(line.outcome)):
        shown = [escape(text) for text in (line.key, _show(line.value), line.outcome, line.text)]
        table.add_row(*shown, style=_COLOURS[line.outcome])
    console.print(table)


def print_config(translation: Translation, path: Path) -> None:
    """Print the config of ours, or the command that takes the place of one."""
    lines = [_comment(f"{_word(line)}: not done") for line in translation.list_lines("not done")]
    if translation.kind == "train":
        config = _in_order(translation.values)
        override_config(config, (), str(path))
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        lines = [_comment(f"From {path.name} of {translation.program}."), *lines, text.rstrip()]
    else:
        command = "run" if translation.kind == "export" else "chat"
        lines = [_comment(f"sft {command} {path}"), *lines]
    typer.echo("\n".join(lines))


def _in_order(values: dict[str, Any]) -> dict[str, Any]:
    """Return sections and settings in the order in which they are defined."""
    ordered = {name: values[name] for name in RunConfig.model_fields if name in values}
    for name, section in ordered.items():
        kind: Any = RunConfig.model_fields[name].annotation
        if isinstance(section, dict):
            ordered[name] = {key: section[key] for key in kind.model_fields if key in section}
    return ordered


def _comment(text: str) -> str:
    """Return a comment of YAML: one line, whatever names and keys hold."""
    return f"# {' '.join(make_visible(text).split())}"


def _word(line: KeyLine) -> str:
    return f"{line.key} = {_show(line.value)}: {line.text}"


def _show(value: Any) -> str:
    if value == NOT_GIVEN:
        return str(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n")[0]
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} […]"
