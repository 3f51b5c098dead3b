"""Which files of this machine a run may read that somebody else has asked for.

Whoever starts a run from the form names datasets, models and templates by their paths, and sees rows of them on the
pages. So runs of the service's pools read below some folders only. A run that a person starts by hand reads what that
person may read.
"""

import os
from pathlib import Path

from tasks import storage

ROOTS, LIMITED = "SFT_DATA_ROOTS", "SFT_LIMIT_PATHS"
"""The folders, with colons between, and whether they are the limit: the pools set that for their runs."""


class OutsideRootsError(ValueError):
    """A path that the service does not read."""


def read_roots() -> list[Path]:
    """Return the folders below which everything may be read: SFT_DATA_ROOTS, or SFT_HOME and the working folder."""
    given = [part for part in os.environ.get(ROOTS, "").split(os.pathsep) if part]
    return [Path(part).expanduser().resolve() for part in given] or [storage.home().resolve(), Path.cwd()]


def check_allowed(path: Path, setting: str) -> None:
    """Refuse a path outside the roots, links followed, whether something is there or not; everything where no limit is.

    Args:
        path: as it was given.
        setting: that it was given in, for the message.

    Raises:
        OutsideRootsError: says the roots and what to do.
    """
    if not os.environ.get(LIMITED):
        return
    roots = read_roots()
    if any(path.resolve().is_relative_to(root) for root in roots):
        return
    raise OutsideRootsError(
        f"{setting}: {path} is not below {' or '.join(str(root) for root in roots)}: runs of the service read nothing "
        f"else. Publish the dataset (`sft publish`), put it there, or start `make serve` with its folder in {ROOTS}"
    )
