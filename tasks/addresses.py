"""Addresses of files elsewhere: which there are, and what none may carry."""

import re
from urllib.parse import unquote, urlsplit

SCHEMES = ("s3", "gs", "az", "hf", "http", "https")
PUBLISHED = "datasets:/"
"""With which the address of a published dataset begins: datasets:/NAME/VERSION."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class AddressError(ValueError):
    """An address that is not read; the message says why, without what could be a secret."""


def is_address(text: str) -> bool:
    """Tell an address from a path and from a name of the hub."""
    return _SCHEME.match(text) is not None


def check_address(address: str) -> None:
    """Refuse what is no address of files, or could carry a key into configs, logs and MLflow.

    Raises:
        AddressError: see there.
    """
    match = _SCHEME.match(address)
    scheme = match[1] if match else ""
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise AddressError(f"{scheme}://: no such addresses are read: known are {known}")
    parts = urlsplit(address if scheme.startswith("http") else address.replace("?", "%3F").replace("#", "%23"))
    shown = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if scheme != "hf" and "@" in parts.netloc:
        raise AddressError(
            f"{shown}: the address names a user: it would be in the config, logs and MLflow: leave it out, and give "
            "credentials in the environment"
        )
    if parts.query or parts.fragment:
        raise AddressError(
            f"{shown}: what follows ? or # may be a key, and would be in the config, logs and MLflow: leave it out"
        )
    if not parts.netloc:
        raise AddressError(f"{shown}: no bucket or host is named: write {scheme}://NAME/PATH")
    if any(unquote(part) in (".", "..") for part in parts.path.split("/")) or "\\" in unquote(address):
        raise AddressError(f"{shown}: . and .. lead nowhere in an address: write the whole path")


def is_below(address: str, root: str) -> bool:
    """Tell whether an address is a root, or below it; a host's letters may be of either size."""
    own, above = urlsplit(address), urlsplit(root.rstrip("/"))
    same = (own.scheme.lower(), own.netloc.lower()) == (above.scheme.lower(), above.netloc.lower())
    return same and f"{own.path}/".startswith(f"{above.path}/")
