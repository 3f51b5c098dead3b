"""What is left out of processes changes nothing that is found, and is there again for whoever asks later."""

import importlib.metadata
import subprocess
import sys

import pytest

from tasks.lean_imports import hidden, lean_path

_SAME = """
import importlib.metadata as metadata
whole = metadata.packages_distributions()
from tasks.lean_imports import shorten_imports
shorten_imports()
lean = metadata.packages_distributions()
assert lean is not whole and dict(lean.items()).keys() == whole.keys()
other = {name for name in whole if name in sys.stdlib_module_names or not {*lean.get(name)} <= {
    part for found in whole[name] for part in (found, found.lower(), name.replace("_", "-"))}}
print(sorted(other), lean.get("no_such_package", []), lean.get("torch"), lean.get("PIL"), lean.get("yaml"))
"""


def test_a_modules_distribution_is_the_one_that_python_finds() -> None:
    done = subprocess.run([sys.executable, "-c", "import sys\n" + _SAME], capture_output=True, text=True, check=True)
    assert done.stdout == "[] [] ['torch'] ['pillow'] ['PyYAML']\n", done.stdout


def test_a_hidden_module_is_not_found_and_then_it_is() -> None:
    name = "this"  # of Python itself, and imported by nobody
    with hidden(name, "importlib.metadata"):
        with pytest.raises(ImportError):
            __import__(name)
        assert importlib.metadata.version("pytest")  # what has been imported stays
    assert __import__("importlib.metadata")
    assert name not in sys.modules


def test_the_folder_stands_before_all_else_and_once() -> None:
    path = lean_path({"PYTHONPATH": "/a:/b"})
    assert path.endswith("/tasks/unimported:/a:/b")
    assert lean_path({"PYTHONPATH": path}) == path
