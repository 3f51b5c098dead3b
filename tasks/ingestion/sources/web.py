"""Files of web servers: one an address, fetched whole, or by ranges where the server has them.

A server's pages are no listings of its files: folders and patterns are not read there.
"""

from collections.abc import Iterator

import httpx

from tasks.allowed_roots import check_allowed_address
from tasks.ingestion.errors import DataError
from tasks.ingestion.sources.remote_files import RemoteFile, name_failure

_SETTING = "data.source, data.eval_source or data.mixture"
_SECONDS = 60.0
_ATTEMPTS = 3
_BLOCK_BYTES = 1 << 20


def find_file(address: str) -> RemoteFile:
    """Ask a server for a file's size and version.

    Raises:
        DataError: it does not answer, or has no such file.
    """
    try:
        with _open_client() as client:
            answer = client.head(address)
            answer.raise_for_status()
    except httpx.HTTPError as error:
        raise name_failure(address, error) from None
    headers = answer.headers
    size = int(headers["content-length"]) if "content-length" in headers else None
    version = f"{size} {headers.get('etag', '')} {headers.get('last-modified', '')}"
    return RemoteFile(address, size, version, size is not None and headers.get("accept-ranges") == "bytes")


def fetch(file: RemoteFile, start: int, stop: int | None) -> Iterator[bytes]:
    """Yield the bytes of a file from a place, up to another one or the end.

    A connection that is lost is made again, and goes on where it was where the server has ranges.

    Raises:
        DataError: the server does not give them, or another number of them.
    """
    place = start
    for attempt in range(_ATTEMPTS):
        try:
            for block in _ask(file, place, stop):
                place += len(block)
                yield block
            break
        except httpx.HTTPError as error:
            if attempt == _ATTEMPTS - 1 or (place > start and not file.has_ranges):
                raise name_failure(file.address, error) from None
    wanted = file.size if stop is None else stop
    if wanted is not None and place != wanted:
        raise DataError(f"{file.address}: {place - start:,} bytes came of {wanted - start:,}: start again")


def _ask(file: RemoteFile, start: int, stop: int | None) -> Iterator[bytes]:
    """Yield what the server sends."""
    is_part = file.has_ranges and (start > 0 or stop is not None)
    headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if is_part else {}
    with _open_client() as client, client.stream("GET", file.address, headers=headers) as answer:
        answer.raise_for_status()
        if is_part and answer.status_code != httpx.codes.PARTIAL_CONTENT:
            raise DataError(f"{file.address}: the server said that it sends parts, and sends the whole: fetch the file")
        yield from answer.iter_raw(_BLOCK_BYTES)


def _open_client() -> httpx.Client:
    """Return a client that follows redirects, each only where the run may read; no byte is decoded on the way.

    Proxies and names for servers are the environment's (HTTPS_PROXY, ~/.netrc).
    """

    def check(request: httpx.Request) -> None:
        check_allowed_address(str(request.url), _SETTING)

    return httpx.Client(
        follow_redirects=True,
        timeout=_SECONDS,
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [check]},
    )
