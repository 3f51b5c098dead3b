"""Makes several calls to the tracking server at the same time."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from tasks.tracking.connection import tracking_uri
from tasks.tracking.stopwatch import tracking_time


def read_pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """Give all that a search of MLflow's finds; one call of it gives a page."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


@tracking_time()
def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Make these calls side by side; return their results in order, or raise the first error of these.

    Each is an exchange with a server that is mostly waited for. A local database answers at once and lets one write at
    a time, so that there they follow each other.
    """
    if tracking_uri().startswith("sqlite:"):
        return [call() for call in calls]
    with ThreadPoolExecutor(len(calls), thread_name_prefix="tracking") as pool:
        futures = [pool.submit(copy_context().run, call) for call in calls]
    return [future.result() for future in futures]
