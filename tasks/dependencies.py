"""What a stage's result depends on besides its inputs: own modules, files beside them, and library versions.

They are found by following the import statements from the stage's task.py, those inside functions too.
"""

import ast
import hashlib
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_OWN = ("flows", "schemas", "tasks")
# They carry results from stage to stage and make none.
_CARRIERS = {"mlflow", "prefect", "ray"}
_MOST_PARSINGS = 10
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def list_files(module: str, root: Path = ROOT) -> list[Path]:
    """Return the files that a module's behaviour depends on: the modules it reaches, and data beside them.

    Data are the files without the ending .py in the folders of the modules reached, such as templates.

    Args:
        module: dotted name, such as tasks.evaluation.task.
        root: folder that holds tasks/ and schemas/.
    """
    modules = _reach(module, root)[0]
    data = {path for folder in {path.parent for path in modules} for path in folder.iterdir() if _is_data(path)}
    return sorted({*modules, *data})


def digest_files(module: str, root: Path = ROOT) -> str:
    """Return the sha256 over names and contents of all files that a module's behaviour depends on."""
    digest = hashlib.sha256()
    for path in list_files(module, root):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def list_libraries(module: str, root: Path = ROOT) -> dict[str, str]:
    """Return the versions of the libraries that a module reaches, of what these require, and of Python.

    A library that is not installed here is "absent": installing it may change what is done.
    """
    imported = _reach(module, root)[1] - _CARRIERS
    below = {name for library in imported for name in _list_requirements(library)} - _CARRIERS
    names = {_normalize(name) for name in (*imported, *below)}
    return {"python": platform.python_version()} | {name: _find_version(name) for name in sorted(names)}


def _reach(module: str, root: Path) -> tuple[set[Path], set[str]]:
    """Return the files of all own modules that a module reaches, and the names of all libraries."""
    start = _find_module(module, root)
    assert start is not None, f"{module} is no module of {root}"
    reached: set[Path] = set()
    known: dict[str, Path | None] = {}
    libraries: set[str] = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        for name in _read_imports(path.read_bytes()):
            first = name.split(".")[0]
            if first in _OWN:
                waiting += _find_modules(name, root, known)
            elif first not in sys.stdlib_module_names:
                libraries.add(first)
    return reached, libraries


@cache
def _read_imports(source: bytes) -> frozenset[str]:
    """Return the dotted names that a module imports; of `from a import b` both a and a.b, as b may be a module."""
    names: set[str] = set()
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}: write the whole name"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def _parse(source: bytes) -> ast.Module:
    """Parse a module, again where another thread did so at the same time.

    CPython 3.11 counts the depth of all threads' syntax trees together, and then finds it wrong ("AST constructor
    recursion depth mismatch").
    """
    for _ in range(_MOST_PARSINGS - 1):
        with suppress(SystemError):
            return ast.parse(source)
        time.sleep(0.05)
    return ast.parse(source)


def _find_modules(name: str, root: Path, known: dict[str, Path | None]) -> Iterator[Path]:
    """Give the files that Python reads for a dotted name: of its packages, and its own.

    Args:
        name: of a module, or of what is in one.
        root: folder of the modules.
        known: files that were looked for, by dotted names; what is found is added. Most names are asked for many times.
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        path = known[part] = known[part] if part in known else _find_module(part, root)
        if path is not None:
            yield path
            if path.name != "__init__.py":
                return  # what comes behind is in the module


def _find_module(name: str, root: Path) -> Path | None:
    place = root.joinpath(*name.split("."))
    found = (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())
    return next(found, None)


def _is_data(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")


@cache
def _list_requirements(library: str) -> frozenset[str]:
    """Return the names of what a library requires without its extras."""
    try:
        lines = requires(library) or []
    except PackageNotFoundError:
        return frozenset()
    matches = (_NAME.match(line) for line in lines if "extra ==" not in line)
    return frozenset(match[0] for match in matches if match)


@cache
def _find_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _normalize(name: str) -> str:
    """Return a name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
