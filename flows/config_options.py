"""What commands that take a config have in common: the file, and settings over it."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path,
    typer.Argument(
        help="YAML config, such as deploy/configs/demo.yaml, or one of LLaMA-Factory's, TRL's or Axolotl's."
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value over the file's own keys.", show_default=False)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: section.field=value. Repeatable.")
]
