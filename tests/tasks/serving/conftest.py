"""A served parrot, on a real port of this machine."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tasks.models import load_model, load_tokenizer
from tasks.serving.app import create_app
from tasks.serving.served_model import ServedModel, open_served
from tests.tasks.serving.parrot import make_parrot


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an application on loopback; give its address."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen(128)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        end = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)


@contextmanager
def opening_folder(folder: Path, **options: Any) -> Iterator[ServedModel]:
    """Load a model folder and start its engine."""
    options = {"names": ("parrot", "parrot/1"), **options}
    served = open_served(load_model(folder), load_tokenizer(folder), folder, **options)
    try:
        yield served
    finally:
        served.close()


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the parrot; the folders of tests that take this fixture share one."""
    folder = tmp_path_factory.getbasetemp() / "parrot"
    return folder if folder.is_dir() else make_parrot(folder)


@pytest.fixture(scope="session")
def served(parrot: Path) -> Iterator[ServedModel]:
    """The parrot's engine."""
    with opening_folder(parrot) as opened:
        yield opened


@pytest.fixture(scope="session")
def address(served: ServedModel) -> Iterator[str]:
    """Where it is served."""
    with listening(create_app(served)) as url:
        yield url
