"""YAML files and `section.field=value` overrides become a RunConfig, or an error that says what to change."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from schemas.config import RunConfig


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the field, the value, the limit and the way out."""


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply `section.field=value` overrides (values are YAML).

    Raises:
        ConfigError: the file is missing, is not YAML, or a field is unknown or out of bounds.
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
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of sections is wanted, got {type(values).__name__}")
    return override_config(values, overrides, str(path))


def override_config(values: dict[str, Any], overrides: tuple[str, ...], where: str = "config") -> RunConfig:
    """Apply `section.field=value` overrides to a mapping, in place, and validate it; errors as `load_config`."""
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, where)


def parse_config(values: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a mapping; raise ConfigError naming each wrong field with its value and limit."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(
            f"{where}: {len(lines)} wrong setting(s)\n" + "\n".join(f"  {line}" for line in lines)
        ) from None


def _describe(detail: Any) -> str:
    """Word one pydantic error: field, value, limit, remedy."""
    field = ".".join(str(part) for part in detail["loc"]) or "config"
    if detail["type"] == "extra_forbidden":
        return f"{field}: unknown setting; {_suggest(detail['loc'])}"
    if detail["type"] == "missing":
        return f"{field}: missing, and it has no default: set it"
    return f"{field} = {detail['input']!r}: {detail['msg']}" if detail["loc"] else str(detail["msg"])


def _suggest(location: tuple[Any, ...]) -> str:
    """Name the nearest known setting of the same section, or all of them."""
    section: type[BaseModel] = RunConfig
    for part in location[:-1]:
        if isinstance(part, int):  # the place in a list of sections
            continue
        annotation = section.model_fields[part].annotation
        inner = next(iter(get_args(annotation)), annotation)
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        section = inner
    known = list(section.model_fields)
    close = get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set `section.field=value` in place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: write section.field=value, such as training.rank=16")
    *sections, field = key.strip().split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {section} is a value, not a section")
    try:
        target[field] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: {text!r} is not a YAML value") from None
