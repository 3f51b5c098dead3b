"""YAML files and `section.field=value` overrides become a RunConfig, or an error that says what to change."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from schemas.config import RunConfig
from schemas.llamafactory.settings import LORA, SETTINGS
from schemas.plurals import count_of

_MAX_NODES = 10_000
"""Values of a config, those that aliases repeat counted each time; the whole config has about a hundred settings."""
_MAX_SHOWN = 300
"""Characters of a wrong value that an error shows."""


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the field, the value, the limit and the way out."""


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file and apply `section.field=value` overrides (values are YAML).

    Raises:
        ConfigError: the file is missing, is not YAML, or a field is unknown or out of bounds.
    """
    return override_config(read_mapping(Path(path)), tuple(overrides), str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of names with their values.

    Raises:
        ConfigError: the file is missing, or is not such YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: the config cannot be read ({error.strerror}): give the path of a YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}): save the config as UTF-8") from None
    try:
        values = _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error)[:_MAX_SHOWN]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of sections is wanted, got {type(values).__name__}")
    return values


def _parse_yaml(text: str) -> Any:
    """Parse YAML whose aliases do not grow.

    Raises:
        yaml.YAMLError: no YAML.
        ValueError: more than _MAX_NODES values, aliases written out, or an alias inside what it names.
        RecursionError: nested too deeply.
    """
    sizes: dict[int, int] = {}
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None and _measure(node, sizes, set()) > _MAX_NODES:
        raise ValueError(f"with its aliases written out it has more than {_MAX_NODES:,} values")
    return yaml.safe_load(text)


def _measure(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """Return the number of values below a node, its own included; `above` are the nodes that it lies in."""
    if id(node) in above:
        raise ValueError("an alias refers to a value that contains it")
    if id(node) not in sizes:
        parts = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        above.add(id(node))
        sizes[id(node)] = 1 + sum(_measure(part, sizes, above) for part in parts)
        above.discard(id(node))
    return sizes[id(node)]


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} … ({len(text):,} characters)"


def quote_text(text: str) -> str:
    """Return a text as YAML takes it on one line, whatever is in it."""
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf)).rstrip("\n")


def override_config(values: dict[str, Any], overrides: tuple[str, ...], where: str = "config") -> RunConfig:
    """Apply `section.field=value` overrides to a mapping, in place, and validate it; errors as `load_config`."""
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, where)


def parse_config(values: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a mapping; raise ConfigError naming each wrong field with its value and limit."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(
            f"{where}: {count_of(len(lines), 'wrong setting')}\n" + "\n".join(f"  {line}" for line in lines)
        ) from None
    _check_homes(config, where)
    return config


def _check_homes(config: RunConfig, where: str) -> None:
    """Refuse a path that begins with ~ and the name of no user."""
    paths = {
        "model.base_model": config.model.base_model,
        "model.chat_template": config.model.chat_template,
        "data.source": config.data.source,
        "data.eval_source": config.data.eval_source,
        **{f"evaluation.probes.{n}.source": probe.source for n, probe in enumerate(config.evaluation.probes)},
        **{f"data.mixture.{number}.source": part.source for number, part in enumerate(config.data.mixture)},
    }
    for field, path in paths.items():
        try:
            Path(path or "").expanduser()
        except RuntimeError as error:
            raise ConfigError(f"{where}: {field} = {path!r}: {error}: write the whole path") from None


def _describe(detail: Any) -> str:
    """Word one pydantic error: field, value, limit, remedy."""
    field, value = _shorten(".".join(str(part) for part in detail["loc"])) or "config", detail["input"]
    if detail["type"] == "extra_forbidden":
        return f"{field}: unknown setting; {_suggest(detail['loc'])}"
    if detail["type"] == "missing":
        return f"{field}: missing, and it has no default: set it"
    if not detail["loc"]:
        return str(detail["msg"])
    told = f"{field} = {_shorten(repr(value))}: "
    if detail["type"] == "tuple_type" and isinstance(value, (str, int, float)):
        return f"{told}a list is wanted: [{_shorten(str(value))}]"
    if detail["type"] == "string_pattern_mismatch" and field == "merge.max_shard_size":
        return f"{told}a size is wanted, such as 500MB or 4GB"
    if detail["type"] == "string_type" and isinstance(value, (int, float)):
        return f'{told}a text is wanted: "{value}"'
    return f"{told}{detail['msg']}"


def _suggest(location: tuple[Any, ...]) -> str:
    """Name the nearest known setting: of the same section, of another one, or all of the section."""
    section: type[BaseModel] = RunConfig
    for part in location[:-1]:
        if isinstance(part, int):  # the place in a list of sections
            continue
        inner = _find_section(section.model_fields[part].annotation)
        assert inner is not None
        section = inner
    name, known = str(location[-1]), list(section.model_fields)
    elsewhere = _list_settings(RunConfig)
    found = [path for path in elsewhere if path.rpartition(".")[2] == name]
    if not found and (setting := {**SETTINGS, **LORA}.get(name)):  # a name that another program has for it
        found = [setting.field]
    if not found and not get_close_matches(name, known, n=1, cutoff=0.8):
        nearest = get_close_matches(name, [path.rpartition(".")[2] for path in elsewhere], n=1, cutoff=0.8)
        found = [path for path in elsewhere if path.rpartition(".")[2] in nearest]
    found = found or get_close_matches(name, known, n=1)
    return f"did you mean {' or '.join(found)}?" if found else f"known here: {', '.join(known)}"


def _find_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, or holds a list of."""
    inner = next(iter(get_args(annotation)), annotation)
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _list_settings(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of all settings of a section and those below it, lists of sections left out."""
    names = []
    for name, field in section.model_fields.items():
        inner = _find_section(field.annotation)
        if inner is None:
            names.append(prefix + name)
        elif not get_args(field.annotation):
            names += _list_settings(inner, f"{prefix}{name}.")
    return names


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `section.field=value` in place; the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r}: write section.field=value, such as training.rank=16")
    *sections, field = key.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
    try:
        target[field] = _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{override[:_MAX_SHOWN]!r}: {text[:_MAX_SHOWN]!r} is not a YAML value") from None
