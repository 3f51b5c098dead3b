"""Sends events that automations of a Prefect server can wait for; without a server nothing is sent."""

from collections.abc import Mapping

import httpx
from prefect.client.orchestration import get_client
from prefect.events import Event
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL


class AnnouncementError(ValueError):
    """The Prefect server did not take an event."""


def announce(
    event: str, resource: str, payload: Mapping[str, str], labels: Mapping[str, str] | None = None
) -> str | None:
    """Send an event about a resource, with labels that automations can match.

    Returns the server's address once it has taken it; None when no server is configured.

    Prefect's own emit_event hands the event to a thread and says nothing when it is lost.

    Raises:
        AnnouncementError: the server did not take it.
    """
    address = PREFECT_API_URL.value()
    if not address:
        return None
    body = Event(event=event, resource={"prefect.resource.id": resource, **(labels or {})}, payload=dict(payload))
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[body.model_dump(mode="json")]).raise_for_status()
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        raise AnnouncementError(f"Prefect at {address} did not take the event {event}: {error}") from error
    return address
