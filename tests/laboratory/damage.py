"""Ways in which a file on a disk goes bad, drawn from a seed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random


def cut(file: Path, draw: Random) -> None:
    """Cut a file short, at any place."""
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip(file: Path, draw: Random) -> None:
    """Flip one bit, and put the file's times back as a disk that rots would leave them."""
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def delete(file: Path, draw: Random) -> None:
    """Delete a file."""
    file.unlink()


def replace_with(other: Path) -> Callable[[Path, Random], None]:
    """Return a way that puts another valid file in the place of a file."""

    def replace(file: Path, draw: Random) -> None:
        assert file.read_bytes() != other.read_bytes(), "the other file is the same"
        shutil.copyfile(other, file)

    return replace
