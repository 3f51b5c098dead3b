"""Pages for people: one HTML file each, without anything from outside, in which what data say is only text."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks.visible_text import make_visible


def open_templates(folder: Path) -> Environment:
    """Return the templates of a folder: everything is escaped, and an unknown name is an error.

    Control characters are written out, those that turn the direction of text too: a row of the data could show itself
    as another one.
    """
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_write_out,
    )


def _write_out(value: Any) -> Any:
    return make_visible(value) if type(value) is str else value  # markup is not data
