"""Compares the locked packages with an advisory database in OSV's format.

    make audit                    # OSV's own database for Python, where it can be reached
    make audit OSV=all.zip        # a copy of it: a zip, or a folder of JSON files

Exit code 0: nothing is known against them. 1: something is. 2: no database could be read, and nothing was compared.
"""

import argparse
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from deploy.supply.install import LOCK, TORCH_LOCK

_ADDRESS = "https://osv-vulnerabilities.storage.googleapis.com/PyPI/all.zip"
_SECONDS = 60.0
_NOTHING_COMPARED = 2


@dataclass(frozen=True)
class Finding:
    """An advisory that names a locked version."""

    package: str
    version: str
    advisory: str
    summary: str
    fixed: tuple[str, ...]
    """Versions in which it is mended."""


def main(arguments: list[str] | None = None) -> int:
    """Print what is known against the locked packages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osv", type=Path, help="zip or folder of advisories; without it OSV's own is fetched")
    options = parser.parse_args(arguments)
    packages = read_locks((TORCH_LOCK, LOCK))
    try:
        advisories = list(read_database(options.osv) if options.osv else _fetch())
    except (OSError, URLError, zipfile.BadZipFile, ValueError) as error:
        print(f"Nothing was compared: no advisory database: {error}. Give a copy of it: make audit OSV=all.zip")
        return _NOTHING_COMPARED
    if not advisories:
        print(f"Nothing was compared: {options.osv or _ADDRESS} has no advisories in OSV's format")
        return _NOTHING_COMPARED
    findings = find_known(packages, advisories)
    for each in findings:
        mended = f"; mended in {', '.join(each.fixed)}" if each.fixed else ""
        print(f"{each.package} {each.version}: {each.advisory}: {each.summary}{mended}")
    print(f"{len(packages)} packages compared with {len(advisories):,} advisories: {len(findings)} known")
    return 1 if findings else 0


def read_locks(locks: Iterable[Path]) -> dict[str, str]:
    """Return the locked version of each package, by its canonical name."""
    lines = "".join(lock.read_text(encoding="utf-8") for lock in locks)
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", lines, re.M)}


def read_database(place: Path) -> Iterator[dict[str, Any]]:
    """Give the advisories of a zip or a folder.

    Raises:
        OSError: there is none.
        zipfile.BadZipFile: a file that is no zip.
        ValueError: one is no JSON.
    """
    if place.is_dir():
        yield from (json.loads(file.read_bytes()) for file in sorted(place.rglob("*.json")))
        return
    with zipfile.ZipFile(place) as archive:
        yield from (json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json"))


def _fetch() -> Iterator[dict[str, Any]]:
    with urlopen(_ADDRESS, timeout=_SECONDS) as reply:
        content = io.BytesIO(reply.read())
    with zipfile.ZipFile(content) as archive:
        yield from (json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json"))


def find_known(packages: dict[str, str], advisories: Iterable[dict[str, Any]]) -> list[Finding]:
    """Return the advisories that hold for these versions; withdrawn ones hold for none."""
    found = []
    for advisory in advisories:
        if advisory.get("withdrawn"):
            continue
        for affected in advisory.get("affected", ()):
            package = affected.get("package", {})
            name = canonicalize_name(package.get("name", ""))
            version = packages.get(name)
            if package.get("ecosystem") != "PyPI" or version is None or not _affects(affected, version):
                continue
            events = [event for span in affected.get("ranges", ()) for event in span.get("events", ())]
            fixed = tuple(dict.fromkeys(str(event["fixed"]) for event in events if "fixed" in event))
            found.append(Finding(name, version, str(advisory.get("id")), str(advisory.get("summary", "")), fixed))
    return sorted(set(found), key=lambda each: (each.package, each.advisory))


def _affects(affected: dict[str, Any], version: str) -> bool:
    """Tell whether a version is listed, or lies in a span that is introduced somewhere and not fixed before it."""
    if version in affected.get("versions", ()):
        return True
    spans = (span for span in affected.get("ranges", ()) if span.get("type") == "ECOSYSTEM")
    return any(_lies_in(span.get("events", ()), Version(version)) for span in spans)


def _lies_in(events: Iterable[dict[str, str]], version: Version) -> bool:
    """Go through a span's events in the order of their versions, as OSV's schema says it is evaluated."""
    is_inside = False
    for place, kind in sorted((_parse(value), kind) for event in events for kind, value in event.items()):
        if kind == "introduced" and version >= place:
            is_inside = True
        if (kind == "fixed" and version >= place) or (kind == "last_affected" and version > place):
            is_inside = False
    return is_inside


def _parse(value: str) -> Version:
    """Return a version; "0" is before all of them, and what is none counts as later than any."""
    try:
        return Version(value) if value != "0" else Version("0.dev0")
    except InvalidVersion:
        return Version("99999!0")


if __name__ == "__main__":
    sys.exit(main())
