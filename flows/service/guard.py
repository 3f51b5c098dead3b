"""Who may speak to the two servers: requests by our names, from our own pages, or from programs that are no browser.

A page of any origin can send requests to loopback through its reader's browser, and a name that its owner points at
127.0.0.1 makes that page look like ours (DNS rebinding). A browser says both in headers that pages cannot change:
`Host`, the name it was sent to, and `Origin`, the page that asked. For a picture or a script it names no page, but says
in `Sec-Fetch-Site` whether that is another's. The log-in is asked for behind this, by the servers.

Prefect's server has no setting for either header. MLflow's has, and lets every page of this machine write.
"""

import os
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS, ORIGINS, AUTH = "SFT_GUARD_HOSTS", "SFT_GUARD_ORIGINS", "SFT_AUTH"
"""What a served process is told: names and pages, with commas between, and whether a log-in is asked for."""
_FRAMES = (b"x-frame-options", b"SAMEORIGIN")  # no page of others around ours: its clicks would be the reader's

_NAME_HELP = "Use one of its own, or add yours to SFT_ALLOWED_ORIGINS."
_PAGE_HELP = "Add yours to SFT_ALLOWED_ORIGINS."


class Guard:
    """An ASGI application that passes on what may speak to the one inside.

    Args:
        app: the server.
        hosts: names and addresses that it is reached by, without ports; IPv6 in brackets.
        origins: pages beside its own that may ask, such as `https://mlflow.example.org`.
        name_help: what to do where a name is refused.
        page_help: what to do where a page is.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Iterable[str],
        origins: Iterable[str],
        name_help: str = _NAME_HELP,
        page_help: str = _PAGE_HELP,
    ) -> None:
        self._app = app
        self._foreign_name = 400, f"This server is not reached by that name. {name_help}"
        self._foreign_page = 403, f"Pages of other origins may not use this server. {page_help}"
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 400 to a name that is not ours, 403 to a page that is not; a websocket is closed before it opens."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refuse(scope)
        if refusal is None:
            await self._app(scope, receive, _without_frames(send))
            return
        status, reason = refusal
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            await PlainTextResponse(f"{reason}\n", status)(scope, receive, send)

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        """Return the HTTP status and the reason of a refusal; None lets the request pass."""
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or _name(hosts[0]) not in self._hosts:
            return self._foreign_name
        for origin in _values(scope, b"origin"):
            if origin not in self._origins and urlsplit(origin).netloc != hosts[0]:
                return self._foreign_page
        return self._foreign_page if _is_part_of_foreign_page(scope) else None


def create_prefect() -> Guard:
    """Return Prefect's server behind the guard, as uvicorn's `--factory` wants it."""
    from prefect.server.api.server import create_app

    from flows.service.prefect_database import use_immediate_transactions

    use_immediate_transactions()
    return guarded(create_app(final=True), os.environ)


def create_mlflow() -> Guard:
    """Return MLflow's server behind the guard: the app that `mlflow server --app-name sft-pipeline` starts.

    It asks for a log-in unless SFT_AUTH is `off`.
    """
    from mlflow.server import app as flask_app

    from flows.service.artifact_locations import keep_locations

    keep_locations(flask_app)
    if os.environ.get(AUTH) == "off":
        from mlflow.server.fastapi_app import app
    else:
        from mlflow.server.auth import create_app

        app = create_app()
    return guarded(app, os.environ)


def guarded(app: ASGIApp, environment: Mapping[str, str]) -> Guard:
    """Put an application behind the guard that the environment describes.

    Raises:
        ValueError: the environment names no host: nobody would be let in.
    """
    hosts = split_list(environment.get(HOSTS))
    if not hosts:
        raise ValueError(f"{HOSTS} is not set: give the names that this server is reached by, with commas between")
    return Guard(app, hosts=hosts, origins=split_list(environment.get(ORIGINS)))


def split_list(text: str | None) -> list[str]:
    """Return the parts of a list with commas between."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _values(scope: Scope, name: bytes) -> list[str]:
    """Return a header's values in lower case; names and origins are compared without regard to case."""
    return [value.decode("latin-1").lower() for key, value in scope["headers"] if key == name]


def _is_part_of_foreign_page(scope: Scope) -> bool:
    """Tell whether a browser loads this into another's page, as a picture, script or style: it sends no origin then.

    A page that is opened by a link is another matter: the reader sees it, and its maker does not.
    """
    site, mode, origin = (_values(scope, name) for name in (b"sec-fetch-site", b"sec-fetch-mode", b"origin"))
    opens = scope.get("method") == "GET" and mode == ["navigate"]
    return not origin and not opens and bool({*site} & {"cross-site", "same-site"})


def _name(host: str) -> str:
    """Return the name of a Host header without its port; an IPv6 address keeps its brackets."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _without_frames(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [header for header in message.get("headers", ()) if header[0].lower() != _FRAMES[0]]
            message["headers"] = [*kept, _FRAMES]
        await send(message)

    return wrapped
