"""Configs of other programs in our terms: whose it is, and its translation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.axolotl import is_axolotl, read_axolotl
from schemas.llamafactory.translation import Translation, clean, is_llamafactory, translate
from schemas.trl import is_trl, read_trl


def name_program(values: Any) -> str:
    """Return whose config a mapping is; empty for one of ours."""
    if is_axolotl(values):
        return "Axolotl"
    return "TRL" if is_trl(values) else "LLaMA-Factory" if is_llamafactory(values) else ""


def translate_any(values: Mapping[str, Any], *, folder: Path = Path(), num_processes: int = 1) -> Translation:
    """Put a config of another program into our terms.

    Args:
        values: the YAML's keys, with what overrides them.
        folder: of the YAML file; paths that do not exist from the working folder are looked for there.
        num_processes: devices that train, for batch sizes that are meant per device.

    Returns:
        Every key that was given has a line. Where a line is refused, the values are not whole.
    """
    program = name_program(values)
    if program == "LLaMA-Factory":
        return translate(values, folder=folder, num_processes=num_processes)
    read = read_trl if program == "TRL" else read_axolotl
    work = read(clean(values), folder, num_processes)
    return Translation("train", work.values, work.finish(), program=program)
