"""A real server of S3's protocol on loopback, for tests."""

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "store-user", "AWS_SECRET_ACCESS_KEY": "store-secret", "AWS_DEFAULT_REGION": "us-east-1"}

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Traffic:
    """The requests to a store that match a pattern, and the bytes of their bodies and answers."""

    def __init__(self, pattern: str) -> None:
        r"""Count by the groups of a pattern for method and path, such as r"(GET) /\S*?(\d{6}\.parquet)"."""
        self.requests: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self._pattern, self._lock = re.compile(pattern), threading.Lock()

    def clear(self) -> None:
        """Begin to count anew."""
        with self._lock:
            self.requests.clear()
            self.num_bytes.clear()

    def watch(self, application: Application) -> Application:
        """Return a WSGI application whose requests are counted."""

        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            found = self._pattern.match(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            if found is None:
                return application(environ, start_response)
            kind = " ".join(found.groups())
            size = int(environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") or environ.get("CONTENT_LENGTH") or 0)

            def start(status: str, headers: Sequence[tuple[str, str]], *rest: Any) -> Any:
                answered = {name.lower(): value for name, value in headers}
                is_sent = environ["REQUEST_METHOD"] != "HEAD"
                with self._lock:
                    self.requests[kind] += 1
                    self.num_bytes[kind] += size + is_sent * int(answered.get("content-length", 0))
                return start_response(status, headers, *rest)

            return application(environ, start)

        return answer


@contextmanager
def serve_bucket(
    name: str, watch: Callable[[Application], Application] = lambda application: application
) -> Iterator[Any]:
    """Give boto3's client of a store with one empty bucket, whose address and keys the environment has.

    Args:
        name: of the bucket.
        watch: given the server's application, returns what answers in its place, such as `Traffic.watch`.
    """
    boto3 = pytest.importorskip("boto3", reason="the s3 extra is not installed")
    moto = pytest.importorskip("moto.server", reason="moto's S3 server is not installed")
    serving = pytest.importorskip("werkzeug.serving", reason="moto's S3 server is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print a line a request
    application = moto.DomainDispatcherApplication(moto.create_backend_app)
    server = serving.make_server(
        "127.0.0.1", 0, watch(application), threaded=True, request_handler=moto.MotoRequestHandler
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        address = "http://{}:{}".format(*server.server_address)
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
                patch.setenv(variable, value)
            patch.setenv("NO_PROXY", f"127.0.0.1,{os.environ.get('NO_PROXY', '')}")
            client = boto3.client("s3", region_name=KEYS["AWS_DEFAULT_REGION"])
            client.create_bucket(Bucket=name)
            yield client
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
