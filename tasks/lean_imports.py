"""Keeps packages out of processes that libraries import where they find them, do without, and take seconds for.

The folder `unimported` holds a module in place of each, which says that it is not there. Put before all others in the
path, it spares every command, server and worker these imports.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_FOLDER = str(Path(__file__).with_name("unimported"))
VARIABLE = "PYTHONPATH"


def shorten_imports() -> None:
    """Spare them to this process, and to those that it starts from now on."""
    if _FOLDER not in sys.path:
        sys.path.insert(0, _FOLDER)
    os.environ[VARIABLE] = lean_path(os.environ)


def lean_path(environment: Mapping[str, str]) -> str:
    """Return an environment's PYTHONPATH with the folder before all else."""
    others = [part for part in environment.get(VARIABLE, "").split(os.pathsep) if part and part != _FOLDER]
    return os.pathsep.join([_FOLDER, *others])


def leave_torch_out() -> None:
    """Keep transformers from importing torch, which takes longer than all else, in a process that runs no model."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that there is no torch
    sys.modules["torch"] = None  # type: ignore[assignment]
