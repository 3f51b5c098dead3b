"""A file at an address, as it was when it was listed."""

from dataclasses import dataclass

from tasks.ingestion.errors import DataError

_MAX_WORDS = 300


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store or of a web server."""

    address: str
    size: int | None
    """In bytes; None where a web server does not say it."""
    version: str
    """What the store says that changes with the content: it stands for the content in digests."""
    has_ranges: bool
    """Parts of it can be asked for."""


def name_failure(address: str, error: Exception) -> DataError:
    """Return what to raise where a client cannot read an address."""
    words = next(iter(str(error).strip().splitlines()), type(error).__name__)[:_MAX_WORDS]
    return DataError(
        f"{address}: it cannot be read ({type(error).__name__}: {words}): correct the address, or the credentials in "
        "the environment (docs/data.md)"
    )
