"""Which files of this machine, and which addresses, a run may read that somebody else has asked for.

Whoever starts a run from the form names datasets, models and templates by their paths, and sees rows of them on the
pages. So runs of the service's pools read below some folders only. A run that a person starts by hand reads what that
person may read.
"""

import os
import re
from pathlib import Path

from tasks import storage
from tasks.addresses import is_address, is_below

ROOTS, LIMITED = "SFT_DATA_ROOTS", "SFT_LIMIT_PATHS"
"""The folders, with colons between, and whether they are the limit: the pools set that for their runs."""


# Of a list with colons between; an address has some of its own.
_ROOT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^:/]*(?::\d+)?[^:]*|[^:]+")


class OutsideRootsError(ValueError):
    """A path or an address that the service does not read."""


def read_roots() -> list[Path]:
    """Return the folders below which everything may be read: SFT_DATA_ROOTS, or SFT_HOME and the working folder."""
    given = [part for part in _list_roots() if not is_address(part)]
    if not _list_roots():
        return [storage.home().resolve(), Path.cwd()]
    return [Path(part).expanduser().resolve() for part in given]


def _list_roots() -> list[str]:
    return _ROOT.findall(os.environ.get(ROOTS, ""))


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
    place = Path(os.path.realpath(path))  # which takes links that go in a circle as they are
    if any(place.is_relative_to(root) for root in roots):
        return
    shown = " or ".join(str(root) for root in roots) or "any folder"
    raise OutsideRootsError(
        f"{setting}: {path} is not below {shown}: runs of the service read nothing "
        f"else. Publish the dataset (`sft publish`), put it there, or start `make serve` with its folder in {ROOTS}"
    )


def check_allowed_address(address: str, setting: str) -> None:
    """Refuse an address that no root names or is above of; everything where no limit is.

    Args:
        address: as it was given, or as a server redirects to.
        setting: that it was given in, for the message.

    Raises:
        OutsideRootsError: says what to do.
    """
    if not os.environ.get(LIMITED) or any(is_below(address, root) for root in _list_roots() if is_address(root)):
        return
    raise OutsideRootsError(
        f"{setting}: {address} is below none of the addresses that this service reads: publish the dataset "
        f"(`sft publish`), or start `make serve` with its bucket or host in {ROOTS}"
    )
