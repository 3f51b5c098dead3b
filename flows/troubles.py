"""What goes wrong around a run, in one sentence with the way out: a disk, a lock, a server, a folder that is gone."""

import errno
from collections.abc import Iterator

import httpx

from tasks.storage import home

_DATABASE_TROUBLES = ("database or disk is full", "attempt to write a readonly database", "disk I/O error")
"""What SQLite says, wherever it is wrapped."""
_LOCKED = "database is locked"
_DISK_TROUBLES = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE),
}
_AGAIN = "start the same command again"


def explain_trouble(error: BaseException) -> OSError | None:
    """Return an error whose sentence helps, or None where a trace does: then it may be a defect of ours."""
    if _is_disk(error):
        said = next((words for words in _DATABASE_TROUBLES if words in str(error)), str(error))
        return OSError(f"{said}: make room for SFT_HOME = {home()}, or make it writable, and {_AGAIN}")
    if _LOCKED in str(error):
        return OSError(f"{_LOCKED}, by another program that writes to SFT_HOME = {home()}: end that one, and {_AGAIN}")
    if isinstance(error, FileNotFoundError) and str(error.filename).startswith(f"{home()}/"):
        return OSError(f"{error.filename} is gone: it was deleted under the run; {_AGAIN}")
    for cause in _causes(error):
        if isinstance(cause, httpx.TransportError):
            return ConnectionError(f"{_describe_server(cause)} ({type(cause).__name__}): {_AGAIN} when it does")
    return None


def _is_disk(error: BaseException) -> bool:
    """Tell whether the disk is full, read-only, broken or not ours."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK_TROUBLES
    return any(words in str(error) for words in _DATABASE_TROUBLES)


def _describe_server(error: httpx.TransportError) -> str:
    from prefect.settings import PREFECT_API_URL

    api = PREFECT_API_URL.value()
    try:
        host = error.request.url.host
    except RuntimeError:  # nobody has set it
        host = None
    if host is None or api is None or host == httpx.URL(api).host:
        return f"Prefect's server at {api or 'an address of its own'} does not answer"
    return f"{host} does not answer"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error and what was given as its causes; not what it merely happened beside, where it may be a defect."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__
