"""YAML files and `section.field=value` overrides become a RunConfig, or an error that says what to change."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from schemas.config import RunConfig

_MAX_NODES = 10_000
"""Values of a config, those that aliases repeat counted each time; the whole config has about a hundred settings."""
_MAX_SHOWN = 300
"""Characters of a wrong value that an error shows."""


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
        values = _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error)[:_MAX_SHOWN]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of sections is wanted, got {type(values).__name__}")
    return override_config(values, overrides, str(path))


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
        raise ValueError("an alias lies inside of what it names")
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


def override_config(values: dict[str, Any], overrides: tuple[str, ...], where: str = "config") -> RunConfig:
    """Apply `section.field=value` overrides to a mapping, in place, and validate it; errors as `load_config`."""
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, where)


def parse_config(values: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a mapping; raise ConfigError naming each wrong field with its value and limit."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(
            f"{where}: {len(lines)} wrong setting(s)\n" + "\n".join(f"  {line}" for line in lines)
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
        **{f"data.mixture.{number}.source": part.source for number, part in enumerate(config.data.mixture)},
    }
    for field, path in paths.items():
        try:
            Path(path or "").expanduser()
        except RuntimeError as error:
            raise ConfigError(f"{where}: {field} = {path!r}: {error}: write the whole path") from None


def _describe(detail: Any) -> str:
    """Word one pydantic error: field, value, limit, remedy."""
    field = ".".join(str(part) for part in detail["loc"]) or "config"
    if detail["type"] == "extra_forbidden":
        return f"{field}: unknown setting; {_suggest(detail['loc'])}"
    if detail["type"] == "missing":
        return f"{field}: missing, and it has no default: set it"
    return f"{field} = {_shorten(repr(detail['input']))}: {detail['msg']}" if detail["loc"] else str(detail["msg"])


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
        target[field] = _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {override[:_MAX_SHOWN]!r}: {text[:_MAX_SHOWN]!r} is not a YAML value") from None
