"""Installs the locked packages into this environment, each file compared with its hash. Needs nothing but pip.

    .venv/bin/python deploy/supply/install.py [--without-hashes]

`torch.lock` has torch and what it brings for CUDA, `requirements.lock` all else. One case cannot be compared: where
pip's own settings name an index or a folder that serves another build of torch (`2.13.0+cpu`; the public index takes
no such versions), that build is taken, and the terminal says from where and with which sha256.
"""

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).resolve().parent
TORCH_LOCK, LOCK = _HERE / "torch.lock", _HERE / "requirements.lock"
_HASHED = ("--require-hashes", "--no-deps", "--no-build-isolation", "-r")
_ADVICE = """
Nothing that differs from the locks was installed. Where the index is a mirror with builds of its own, and you trust it:
make demo HASHES=no"""
BUILDERS = ("setuptools", "wheel")
"""What builds packages that come as sources; pip would else fetch it as it likes."""


def main(arguments: list[str]) -> int:
    """Install torch, everything else, and the project itself; return pip's exit code where it fails."""
    if arguments == ["--without-hashes"]:
        return _install_without_hashes()
    torch: tuple[str, ...] = (*_HASHED, str(TORCH_LOCK))
    found = _find_torch()
    if found is not None and is_own_build(found, _list_settings()):
        info = found["download_info"]
        print(
            f"torch {found['metadata']['version']} comes from {info['url']}, which pip's own settings name: it is "
            f"compared with no hash. Its sha256: {info.get('archive_info', {}).get('hashes', {}).get('sha256')}"
        )
        torch = ("--no-deps", f"torch=={found['metadata']['version']}")
    project = ("--no-deps", "--no-build-isolation", "--no-index", "-e", str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "builders.lock"
        first.write_text(select(LOCK.read_text(encoding="utf-8"), BUILDERS), encoding="utf-8")
        for step in ((*_HASHED, str(first)), torch, (*_HASHED, str(LOCK)), project):
            if code := _install(*step):
                print(_ADVICE, file=sys.stderr)
                return code
    _compile()
    return 0


def _install_without_hashes() -> int:
    """Install the tested versions as pip finds them; torch first, so that nothing chooses another build of it."""
    print("No file is compared with a hash: the packages are what pip's index serves under these names and versions.")
    torch = select(TORCH_LOCK.read_text(encoding="utf-8"), ("torch",)).split()[0]
    for step in ((torch,), ("-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[dev]")):
        if code := _install(*step):
            return code
    _compile()
    return 0


def _install(*arguments: str) -> int:
    """Install without bytecode and return pip's exit code."""
    return _pip("install", "--quiet", "--no-compile", *arguments).returncode


def _compile() -> None:
    """Compile all packages on all cores. A file that no Python 3 can read, such as a template, is left as it is."""
    command = [sys.executable, "-m", "compileall", "-qq", "-j", "0", sysconfig.get_path("purelib")]
    subprocess.run(command, capture_output=True, check=False)


def select(lock: str, names: tuple[str, ...]) -> str:
    """Return the entries of these packages, each a line and its hashes below."""
    entries = re.split(r"^(?=\S)", lock, flags=re.MULTILINE)
    return "".join(entry for entry in entries if entry.partition("==")[0] in names)


def is_own_build(found: dict[str, Any], settings: str) -> bool:
    """Tell whether a package is a build of the user's own: a version with a local part, from where the settings point.

    Args:
        found: an entry of pip's report.
        settings: pip's, as `pip config list` prints them.
    """
    place = urlsplit(found["download_info"]["url"])
    is_named = place.scheme == "file" or (place.hostname is not None and place.hostname in settings)
    return "+" in found["metadata"]["version"] and is_named


def _list_settings() -> str:
    return str(_pip("config", "list", capture_output=True, text=True).stdout)


def _find_torch() -> dict[str, Any] | None:
    """Return what pip would install as torch, as its report says it; None where it finds nothing or cannot say."""
    version = re.search(r"^torch==(\S+)", TORCH_LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None, TORCH_LOCK
    options = ("--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-", f"torch=={version[1]}")
    done = _pip("install", *options, capture_output=True, text=True)
    if done.returncode:
        return None
    found: dict[str, Any] = json.loads(done.stdout)["install"][0]
    return found


def _pip(*arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=False, **options
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
