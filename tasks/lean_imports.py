"""Keeps packages out of processes that libraries import where they find them, do without, and take seconds for.

The folder `unimported` holds a module in place of each, which says that it is not there. Put before all others in the
path, it spares every command, server and worker these imports. What only one importer does without is hidden from that
one.
"""

import importlib.metadata
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_FOLDER = str(Path(__file__).with_name("unimported"))
VARIABLE = "PYTHONPATH"


def shorten_imports() -> None:
    """Spare them to this process, and to those that it starts from now on.

    Nor are the files of all installed packages listed at import: transformers asks which package brings which module.
    """
    importlib.metadata.packages_distributions = _Distributions
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


@contextmanager
def hidden(*modules: str) -> Iterator[None]:
    """Let what is imported in the body not find these modules, so far as nothing has imported them before.

    For imports at the top of a module: another thread would not find them either.
    """
    absent = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


_list_distributions = cache(importlib.metadata.packages_distributions)


class _Distributions(Mapping[str, list[str]]):
    """Which distributions bring each module, as `packages_distributions` says it; listed whole only where it must be.

    A module that is named as its distribution is taken to come from it. Several share `flash_attn`.
    """

    def __getitem__(self, module: str) -> list[str]:
        name = module.replace("_", "-")
        if not module.startswith("flash_attn"):
            try:
                importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                pass
            else:
                return [name]
        return _list_distributions()[module]

    def __iter__(self) -> Iterator[str]:
        return iter(_list_distributions())

    def __len__(self) -> int:
        return len(_list_distributions())
