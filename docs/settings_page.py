"""docs/settings.md, made from the configuration model: `python -m docs.settings_page`."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from schemas.config import RunConfig

PAGE = Path(__file__).parent / "settings.md"
_HEAD = """# Settings

Made by `python -m docs.settings_page` from [schemas/config.py](../schemas/config.py). A test
fails when it is out of date.

A config is a YAML file with a section a stage. A setting that is left out has its default. On the command line a
setting is `--set training.rank=16`. A name that is not here is refused, and so is a value beyond its bounds. The form
of [the service](service.md) has the same settings.
"""
_PLAIN = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
_SIGNS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def make_page() -> str:
    """Return the page as Markdown."""
    top = [(name, field) for name, field in RunConfig.model_fields.items() if _find_section(field) is None]
    parts = [_HEAD, _make_table("", top)]
    for name, field in RunConfig.model_fields.items():
        if (section := _find_section(field)) is not None:
            parts += _make_section(name, section)
    return "\n".join(parts)


def _make_section(path: str, section: type[BaseModel]) -> Iterator[str]:
    """Yield the heading and table of a section, then those of the sections in it."""
    yield f"## {path}\n\n{_first_line(section)}\n"
    inner = {name: _find_section(field) for name, field in section.model_fields.items()}
    yield _make_table(path, section.model_fields.items())
    for name, model in inner.items():
        if model is not None:
            yield from _make_section(f"{path}.{name}", model)


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _find_section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a section, or a list of them."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _make_table(path: str, fields: Any) -> str:
    rows = ["| setting | value | default | |", "| --- | --- | --- | --- |"]
    for name, field in fields:
        setting = f"{path}.{name}" if path else name
        words = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{setting}` | {_describe_value(setting, field)} | {_describe_default(field)} | {words} |")
    return "\n".join(rows) + "\n"


def _describe_value(setting: str, field: FieldInfo) -> str:
    if (section := _find_section(field)) is not None:
        anchor = setting.replace(".", "")
        return f"[a section](#{anchor})" if field.annotation is section else f"[a list of sections](#{anchor})"
    described = _describe_choices(field) or _describe_type(field.annotation)
    return ", ".join([described, *_describe_bounds(field)])


def _describe_choices(field: FieldInfo) -> str:
    """Return what a form offers for a text; empty where it may be any."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return ", ".join(f"`{choice}`" for choice in extra.get("enum", ()))  # type: ignore[union-attr]


def _describe_bounds(field: FieldInfo) -> Iterator[str]:
    for bound in field.metadata:
        for name, words in _SIGNS.items():
            if (limit := getattr(bound, name, None)) is not None:
                yield f"{words} {limit:,.0f}" if limit == int(limit) else f"{words} {limit:g}"


def _describe_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (types.UnionType, Union):
        return " or ".join(_describe_type(part) for part in arguments if part is not types.NoneType)
    if origin is Annotated:
        return _describe_choices(arguments[1]) or _describe_type(arguments[0])
    if origin is tuple:
        return f"a list of {_describe_type(arguments[0])}"
    if origin is dict:
        return f"a mapping of text to {_describe_type(arguments[1])}"
    return _PLAIN[annotation]


def _describe_default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.default_factory() if field.default_factory is not None else field.default  # type: ignore[call-arg]
    assert value is not PydanticUndefined
    if isinstance(value, BaseModel):
        return ""
    if value in (None, "", (), {}):
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{', '.join(value)}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
