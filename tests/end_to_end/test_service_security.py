"""Nobody gets in: other names, other pages, no log-in; and who is in starts our flows and no program of their own."""

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.end_to_end import browser
from tests.end_to_end.service import Service, free_port, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SFT_SERVICE_TESTS" not in os.environ, reason="takes minutes: set SFT_SERVICE_TESTS=1"),
]
_FOREIGN = "evil.example"
_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def _servers(service: Service) -> dict[str, str]:
    """Return a readable address of each server."""
    client = service.client
    return {
        f"{client['PREFECT_API_URL']}/flows/count": "POST",
        f"{client['MLFLOW_TRACKING_URI']}/ajax-api/2.0/mlflow/experiments/search": "POST",
        f"{client['PREFECT_API_URL']}/health": "GET",
        f"{client['MLFLOW_TRACKING_URI']}/health": "GET",
        client["PREFECT_UI_URL"]: "GET",
        client["MLFLOW_TRACKING_URI"]: "GET",
    }


def _login(service: Service) -> tuple[str, str]:
    return service.client["MLFLOW_TRACKING_USERNAME"], service.client["MLFLOW_TRACKING_PASSWORD"]


def test_a_foreign_name_is_refused_on_both_servers_even_with_the_log_in(service: Service) -> None:
    for address, method in _servers(service).items():
        port = urlsplit(address).port
        for host in (f"{_FOREIGN}:{port}", f"10.{_FOREIGN}:{port}", _FOREIGN):
            headers = {"Host": host}
            answer = httpx.request(method, address, headers=headers, auth=_login(service), json={"max_results": 1})
            assert answer.status_code == 400, (address, host)


def test_a_foreign_page_is_refused_on_both_servers_even_with_the_log_in(service: Service) -> None:
    for address, method in _servers(service).items():
        for origin in (f"http://{_FOREIGN}", "null", f"http://localhost:{free_port()}"):
            for asked in (method, "OPTIONS"):
                headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
                answer = httpx.request(asked, address, headers=headers, auth=_login(service))
                assert answer.status_code == 403, (address, origin)
                assert "access-control-allow-origin" not in answer.headers


def test_a_foreign_page_opens_no_websocket(service: Service) -> None:
    address = service.client["PREFECT_API_URL"].replace("http", "ws", 1) + "/events/in"
    foreign: Any = {"origin": f"http://{_FOREIGN}", "subprotocols": ["prefect"]}
    with pytest.raises(InvalidStatus, match="403"), connect(address, **foreign):
        pass
    own: Any = {**foreign, "origin": service.client["PREFECT_UI_URL"]}
    with connect(address, **own) as socket:
        assert socket.subprotocol == "prefect"


@pytest.mark.parametrize("variable", ["command", "env", "env.PYTHONPATH", "working_dir", "image", "stream_output"])
def test_a_run_from_the_form_brings_no_job_variable(service: Service, variable: str) -> None:
    path = f"/deployments/{service.deployment('rollback/rollback')['id']}/create_flow_run"
    with pytest.raises(httpx.HTTPStatusError) as caught:
        service.prefect("POST", path, {"parameters": {"name": "none"}, "job_variables": {variable: "x"}})
    assert caught.value.response.status_code == 422
    assert variable in caught.value.response.text


def test_job_variables_that_get_past_the_server_change_nothing_at_the_worker(service: Service, tmp_path: Path) -> None:
    by_command, by_import = tmp_path / "by-command", tmp_path / "by-import"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(by_import)!r}, 'w').close()\n")
    variables = {"command": f"touch {by_command}", "env": {"PYTHONPATH": str(tmp_path)}, "working_dir": str(tmp_path)}
    deployment = service.deployment("rollback/rollback")
    wanted = {"flow_id": deployment["flow_id"], "deployment_id": deployment["id"], "job_variables": variables}
    wanted |= {"work_pool_name": "cpu", "work_queue_name": "default", "state": {"type": "SCHEDULED"}}
    # The one call that Prefect does not check job variables in.
    run = service.prefect("POST", "/flow_runs/", {**wanted, "parameters": {"name": "no-such-model"}})["id"]
    wait_until(lambda: service.run(run)["state"]["type"] in _ENDED, seconds=300)
    assert "no registered model" in service.run(run)["state"]["message"]  # our flow ran, and nothing else
    assert not by_command.exists()
    assert not by_import.exists()


class _Hostile(BaseHTTPRequestHandler):
    page = ""

    def do_GET(self) -> None:
        body = self.page.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hostile() -> Iterator[int]:
    """A web server whose page tries what it can; the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hostile)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


# Everything that a page can send: with what the browser knows of the log-in, readable or not, as JSON or as what needs
# no leave from the server, by form, by websocket. It keeps what it could read.
_ATTACK = """
<iframe name="sink"></iframe><script>
const targets = %(targets)s, found = [];
const note = (what, value) => found.push([what, value]);
async function send(url, body) {
  for (const mode of ["cors", "no-cors"]) for (const credentials of ["include", "omit"])
    for (const type of mode == "cors" ? ["application/json", "text/plain"] : ["text/plain"])
      try {
        const reply = await fetch(url, {method: "POST", mode, credentials, body, headers: {"Content-Type": type}});
        if (reply.type != "opaque") note("POST " + url, reply.status + " " + (await reply.text()).slice(0, 80));
      } catch (error) {}
}
async function read(url) {
  for (const credentials of ["include", "omit"]) try {
    const reply = await fetch(url, {credentials});
    note("GET " + url, reply.status + " " + (await reply.text()).slice(0, 80));
  } catch (error) {}
}
function form(url, body) {
  const made = document.createElement("form");
  Object.assign(made, {method: "POST", action: url, enctype: "text/plain", target: "sink"});
  const cut = body.lastIndexOf('"');
  made.append(Object.assign(document.createElement("input"), {name: body.slice(0, cut), value: body.slice(cut)}));
  document.body.append(made); made.submit();
}
function listen(url, message) {
  return new Promise(done => {
    const socket = new WebSocket(url); setTimeout(done, 5000);
    socket.onopen = () => { note("WS " + url, "open"); socket.send(message); done(); };
    socket.onerror = () => done();
  });
}
function load(tag, url) {
  return new Promise(done => {
    const made = Object.assign(document.createElement(tag), {onload: () => { note(tag + " " + url, "loaded"); done(); },
      onerror: done});
    tag == "link" ? Object.assign(made, {rel: "stylesheet", href: url}) : made.src = url;
    document.body.append(made);
  });
}
(async () => {
  for (const url of targets.load) for (const tag of ["img", "script", "link"]) await load(tag, url);
  for (const url of targets.read) await read(url);
  for (const [url, body] of targets.send) { await send(url, JSON.stringify(body)); form(url, JSON.stringify(body)); }
  for (const [url, message] of targets.listen) await listen(url, JSON.stringify(message));
  window.found = found; window.done = true;
})();
</script>
"""


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium on this machine")
def test_a_hostile_page_in_a_browser_that_is_logged_in_reaches_nothing(
    service: Service, hostile: int, tmp_path: Path
) -> None:
    stolen = tmp_path / "stolen"
    _Hostile.page = _ATTACK % {"targets": json.dumps(_targets(service, stolen))}
    before = _what_there_is(service)
    rules = f"MAP {_FOREIGN} 127.0.0.1"  # a name of the attacker's that points here, as in DNS rebinding
    ports = {urlsplit(service.client[name]).port for name in ("PREFECT_UI_URL", "MLFLOW_TRACKING_URI")}
    with browser.open_browser(service, f"--host-resolver-rules={rules}") as page:
        page.goto(browser.mlflow_page(service))
        page.get_by_text(
            "Experiments"
        ).first.wait_for()  # so the browser has MLflow's log-in too, and adds it by itself
        for origin in (f"http://{_FOREIGN}:{hostile}", f"http://localhost:{hostile}"):
            page.goto(origin)
            page.wait_for_function("window.done", timeout=120_000)
            assert page.evaluate("window.found") == []
        for port in ports:
            page.goto(f"http://{_FOREIGN}:{port}/api/health")
            assert "not reached by that name" in page.inner_text("body")
    time.sleep(5)  # what was started would have been picked up
    assert _what_there_is(service) == before
    assert not stolen.exists()


def _targets(service: Service, stolen: Path) -> dict[str, Any]:
    """Return what the page tries, with everything that an attacker could know but for the log-in."""
    prefect, mlflow = service.client["PREFECT_API_URL"], service.client["MLFLOW_TRACKING_URI"]
    variables = {"command": f"touch {stolen}"}
    event = {"event": "dataset.published", "resource": {"prefect.resource.id": "dataset.x"}, "payload": {"uri": "/etc"}}
    run = {"parameters": {"name": "none"}, "state": {"type": "SCHEDULED"}}
    deployment = service.deployment("rollback/rollback")
    create = f"{prefect}/deployments/{deployment['id']}/create_flow_run"
    pages = service.client["PREFECT_UI_URL"]
    return {
        "load": [f"{pages}/ico/favicon-16x16.png", f"{pages}/robots.txt", f"{mlflow}/static-files/favicon.ico"],
        "read": [
            f"{prefect}/deployments/name/rollback/rollback",
            f"{mlflow}/ajax-api/2.0/mlflow/experiments/get?experiment_id=0",
            f"{mlflow}/api/2.0/mlflow/users/current",
        ],
        "send": [
            [create, run],
            [create, {**run, "job_variables": variables}],
            [f"{prefect}/flow_runs/", {**run, "flow_id": deployment["flow_id"], "work_pool_name": "cpu"}],
            [f"{prefect}/events", [event]],
            [f"{mlflow}/ajax-api/2.0/mlflow/experiments/create", {"name": "hostile"}],
            [f"{mlflow}/api/2.0/mlflow/registered-models/create", {"name": "hostile"}],
            [f"{mlflow}/api/2.0/mlflow/users/create", {"username": "hostile", "password": "hostile-password"}],
        ],
        "listen": [[prefect.replace("http", "ws", 1) + "/events/in", event]],
    }


def _what_there_is(service: Service) -> dict[str, Any]:
    mlflow, login = f"{service.client['MLFLOW_TRACKING_URI']}/api/2.0/mlflow", _login(service)
    return {
        "runs": service.prefect("POST", "/flow_runs/count", {}),
        "deployments": service.prefect("POST", "/deployments/count", {}),
        "published": service.prefect("POST", "/events/filter", _of_datasets())["total"],
        "experiments": httpx.get(f"{mlflow}/experiments/search?max_results=1000", auth=login).json(),
        "models": httpx.get(f"{mlflow}/registered-models/search", auth=login).json(),
        "users": httpx.get(f"{mlflow}/users/list", auth=login).text,
    }


def _of_datasets() -> dict[str, Any]:
    return {"filter": {"event": {"prefix": ["dataset."]}}}
