"""Writes torch.lock and requirements.lock: the packages of constraints.txt, for every platform, with all their hashes.

    make lock

The index is asked for the hashes of every file that it has of these versions; uv does that, and finds what other
platforms need besides (CUDA's libraries).
"""

import re
import subprocess
import sys

from deploy.supply.install import BUILDERS, LOCK, ROOT, TORCH_LOCK

_OF_TORCH = re.compile(r"torch|triton|cuda-.*|nvidia-(?!ml-py)[\w-]+")
_TITLE = "# Written by `make lock` from constraints.txt; `make` installs it, each file compared with its hash.\n"


def main() -> int:
    """Write the locks; return 1 where uv fails."""
    command = ["uv", "pip", "compile", "--universal", "--python-version", "3.11.5", "--generate-hashes", "--quiet"]
    command += ["--no-annotate", "--no-header", "--extra", "dev", "-c", "constraints.txt", "pyproject.toml", "-"]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(BUILDERS), capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    ours, others = split_lock(done.stdout)
    TORCH_LOCK.write_text(_TITLE + ours, encoding="utf-8")
    LOCK.write_text(_TITLE + others, encoding="utf-8")
    return 0


def split_lock(text: str) -> tuple[str, str]:
    """Part a lock's entries into those of torch with CUDA's libraries, and the others."""
    parts: tuple[list[str], list[str]] = ([], [])
    for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        name = entry.partition("==")[0]
        parts[0 if _OF_TORCH.fullmatch(name) else 1].append(entry)
    return "".join(parts[0]), "".join(parts[1])


if __name__ == "__main__":
    sys.exit(main())
