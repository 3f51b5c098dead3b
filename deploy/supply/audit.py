"""Compares the locked packages with an advisory database in OSV's format.

    make audit                    # OSV's own database for Python, where it can be reached
    make audit OSV=all.zip        # a copy of it: a zip, or a folder of JSON or YAML files (as PyPA's advisory-database)

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

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from deploy.supply.install import LOCK, TORCH_LOCK

_ADDRESS = "https://osv-vulnerabilities.storage.googleapis.com/PyPI/all.zip"
_SECONDS = 60.0
_NOTHING_COMPARED = 2
_ECOSYSTEM = "PyPI"
_SUMMARY_CHARACTERS = 160


@dataclass(frozen=True)
class Finding:
    """An advisory that names a locked version."""

    package: str
    version: str
    advisory: str
    summary: str
    fixed: tuple[str, ...]
    """Versions in which it is mended."""
    aliases: tuple[str, ...]
    """What other databases call it."""


def main(arguments: list[str] | None = None) -> int:
    """Print what is known against the locked packages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osv", type=Path, help="zip or folder of advisories; without it OSV's own is fetched")
    options = parser.parse_args(arguments)
    packages = read_locks((TORCH_LOCK, LOCK))
    try:
        advisories = list(read_database(options.osv) if options.osv else _fetch())
    except (OSError, URLError, zipfile.BadZipFile, ValueError, yaml.YAMLError) as error:
        print(f"Nothing was compared: no advisory database: {error}. Give a copy of it: make audit OSV=all.zip")
        return _NOTHING_COMPARED
    if not advisories:
        print(f"Nothing was compared: {options.osv or _ADDRESS} has no advisories in OSV's format")
        return _NOTHING_COMPARED
    findings = find_known(packages, advisories)
    for each in findings:
        mended = f"; mended in {', '.join(each.fixed)}" if each.fixed else ""
        names = f" ({', '.join(each.aliases)})" if each.aliases else ""
        print(f"{each.package} {each.version}: {each.advisory}{names}: {each.summary}{mended}")
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
        yaml.YAMLError: one is no YAML.
    """
    if place.is_dir():
        for file in sorted(place.rglob("*")):
            if file.suffix == ".json":
                yield json.loads(file.read_bytes())
            elif file.suffix in (".yaml", ".yml"):
                yield yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return
    with zipfile.ZipFile(place) as archive:
        yield from (json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json"))


def _fetch() -> Iterator[dict[str, Any]]:
    with urlopen(_ADDRESS, timeout=_SECONDS) as reply:
        content = io.BytesIO(reply.read())
    with zipfile.ZipFile(content) as archive:
        yield from (json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json"))


def find_known(packages: dict[str, str], advisories: Iterable[dict[str, Any]]) -> list[Finding]:
    """Return the advisories that hold for these versions; withdrawn ones hold for none.

    OSV has one record of a vulnerability for each database that it comes from; the first by name stands for all.
    """
    found = set()
    for advisory in advisories:
        if not isinstance(advisory, dict) or advisory.get("withdrawn"):
            continue
        for affected in advisory.get("affected") or ():
            package = affected.get("package") or {}
            name = canonicalize_name(package.get("name", ""))
            version = packages.get(name)
            if not _is_ours(package) or version is None or not _affects(affected, version):
                continue
            events = [event for span in _spans(affected) for event in span.get("events") or ()]
            fixed = tuple(dict.fromkeys(str(event["fixed"]) for event in events if "fixed" in event))
            aliases = tuple(sorted(map(str, advisory.get("aliases") or ())))
            found.add(Finding(name, version, str(advisory.get("id")), _summarize(advisory), fixed, aliases))
    kept: list[Finding] = []
    for each in sorted(found, key=lambda each: (each.package, each.advisory)):
        if not any(other.package == each.package and each.advisory in other.aliases for other in kept):
            kept.append(each)
    return kept


def _is_ours(package: dict[str, Any]) -> bool:
    """Tell whether a package is PyPI's; an ecosystem may have a suffix after a colon."""
    return str(package.get("ecosystem", "")).partition(":")[0] == _ECOSYSTEM


def _summarize(advisory: dict[str, Any]) -> str:
    """Return an advisory in one line: its summary, which PyPA's have none of, or the beginning of its details."""
    text = " ".join(str(advisory.get("summary") or advisory.get("details") or "").split())
    return text if len(text) <= _SUMMARY_CHARACTERS else text[: _SUMMARY_CHARACTERS - 1] + "…"


def _spans(affected: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the ranges that speak of versions; those of type GIT speak of commits."""
    return [span for span in affected.get("ranges") or () if span.get("type") == "ECOSYSTEM"]


def _affects(affected: dict[str, Any], version: str) -> bool:
    """Tell whether a version is listed, or lies in a span that is introduced somewhere and not fixed before it."""
    own = Version(version)
    if any(listed == version or _parse(listed) == own for listed in affected.get("versions") or ()):
        return True
    return any(_lies_in(span.get("events") or (), own) for span in _spans(affected))


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
