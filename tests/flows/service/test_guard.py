"""Names and pages that are not ours are turned away before a server sees them; programs and our own pages pass."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from flows.service.guard import HOSTS, ORIGINS, guarded

_ENVIRONMENT = {
    HOSTS: "127.0.0.1,localhost,[::1],box.example.org",
    ORIGINS: "http://127.0.0.1:4200,http://localhost:4200,https://prefect.example.org",
}
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@pytest.fixture
def reached() -> list[str]:
    """What the server inside has seen."""
    return []


@pytest.fixture
def client(reached: list[str]) -> Iterator[TestClient]:
    async def answer(request: Request) -> PlainTextResponse:
        reached.append(request.method)
        return PlainTextResponse("inside", headers={"x-frame-options": "ALLOWALL"})

    async def listen(socket: WebSocket) -> None:
        reached.append("socket")
        await socket.accept()
        await socket.close()

    app = Starlette(routes=[Route("/{path:path}", answer, methods=_METHODS), WebSocketRoute("/{path:path}", listen)])
    with TestClient(guarded(app, _ENVIRONMENT), base_url="http://127.0.0.1:4200") as client:
        yield client


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:4200",
        "127.0.0.1.evil.example:4200",
        "localhost.:4200",
        "evil.example",
        "10.evil.example:5000",
        "[::2]:4200",
    ],
)
@pytest.mark.parametrize("path", ["/api/health", "/health", "/"])
def test_another_name_is_refused_on_every_path(client: TestClient, reached: list[str], host: str, path: str) -> None:
    assert client.get(path, headers={"Host": host}).status_code == 400
    assert reached == []


@pytest.mark.parametrize("host", ["127.0.0.1:4200", "LOCALHOST:4201", "[::1]:4200", "[::1]", "box.example.org"])
def test_own_names_pass_with_any_port(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"Host": host}).text == "inside"


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://127.0.0.1:8888",
        "http://localhost:4201",
        "http://127.0.0.1:4200.evil.example",
        "",
    ],
)
@pytest.mark.parametrize("method", _METHODS)
def test_another_page_is_refused_with_every_method(
    client: TestClient, reached: list[str], method: str, origin: str
) -> None:
    answer = client.request(method, "/api/flow_runs", headers={"Origin": origin})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert reached == []


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:4200", "http://127.0.0.1:4200"),
        ("127.0.0.1:4200", "http://localhost:4200"),  # a page opened under the other name
        ("localhost:9999", "http://localhost:9999"),  # through a tunnel
        ("127.0.0.1:4200", "https://prefect.example.org"),  # a reverse proxy that does not pass the name on
        ("box.example.org", "https://box.example.org"),  # one that does
    ],
)
def test_own_pages_pass(client: TestClient, reached: list[str], host: str, origin: str) -> None:
    assert client.post("/", headers={"Host": host, "Origin": origin}).text == "inside"
    assert reached == ["POST"]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize(("method", "mode"), [("GET", "no-cors"), ("POST", "no-cors"), ("POST", "navigate")])
def test_what_another_page_loads_without_an_origin_is_refused(
    client: TestClient, reached: list[str], site: str, method: str, mode: str
) -> None:
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
    assert client.request(method, "/get-artifact", headers=headers).status_code == 403
    assert reached == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},  # a link on another page
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},  # typed by the reader
        {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "no-cors"},  # a picture of our own page
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Origin": "https://prefect.example.org"},
    ],
)
def test_what_our_own_pages_load_and_links_to_them_pass(
    client: TestClient, reached: list[str], headers: dict[str, str]
) -> None:
    assert client.get("/", headers=headers).status_code == 200
    assert reached == ["GET"]


def test_programs_pass_for_they_send_no_origin(client: TestClient) -> None:
    assert client.post("/").text == "inside"


@pytest.mark.parametrize(
    "headers", [{"Host": "127.0.0.1:4200", "Origin": "http://evil.example"}, {"Host": "evil.example"}]
)
def test_a_websocket_is_closed_before_it_opens(client: TestClient, reached: list[str], headers: dict[str, str]) -> None:
    with (
        pytest.raises((WebSocketDisconnect, WebSocketDenialResponse)),
        client.websocket_connect("/events/in", headers=headers),
    ):
        pass
    assert reached == []
    own = {"Host": "127.0.0.1:4200"}
    with client.websocket_connect("/events/in", headers={**own, "Origin": "http://127.0.0.1:4200"}):
        pass
    assert reached == ["socket"]


def test_no_other_page_shows_ours_in_a_frame(client: TestClient) -> None:
    assert client.get("/").headers.get_list("x-frame-options") == ["SAMEORIGIN"]


def test_two_host_headers_are_refused() -> None:
    async def inside(scope: object, receive: object, send: object) -> None:
        raise AssertionError("reached")

    transport = httpx.ASGITransport(guarded(inside, _ENVIRONMENT))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:4200") as client:
            headers = [("Host", "127.0.0.1:4200"), ("Host", "evil.example")]
            return (await client.get("/", headers=headers)).status_code

    assert asyncio.run(ask()) == 400


def test_without_names_it_does_not_start() -> None:
    with pytest.raises(ValueError, match=HOSTS):
        guarded(Starlette(), {ORIGINS: "http://127.0.0.1:4200"})
