"""The connection to a Ray cluster: the one that SFT_RAY_ADDRESS names, or one of this machine that is started."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tasks.lean_imports import VARIABLE, lean_path

ADDRESS = "SFT_RAY_ADDRESS"
"""`local` starts a cluster of this machine; any other value is what `ray start` says, such as 10.0.0.5:6379."""
LOCAL = "local"
_STORE_BYTES = 1 << 30
"""The object store of a local cluster."""
_START_ATTEMPTS = 3
_ANSWER_SECONDS = 5.0
_NO_REPORTS = "RAY_USAGE_STATS_ENABLED"
"""Of what is done, to Ray's makers."""
_ADVICE = (
    "start one by `ray start --head` on this machine, with the same Ray and token (RAY_AUTH_TOKEN) everywhere, "
    f"or set {ADDRESS}={LOCAL}, or unset it to use this machine's cores"
)


class ClusterError(ValueError):
    """The cluster cannot be used, or lost the same call again and again; says where and what to do."""


def is_named() -> bool:
    """Tell whether calls go to a cluster."""
    return bool(os.environ.get(ADDRESS))


def stop() -> None:
    """Leave the cluster; a local one ends."""
    if is_named():
        import ray

        ray.shutdown()


def connect() -> Any:
    """Return Ray, connected.

    Raises:
        ClusterError: it is not installed, or nothing answers.
    """
    os.environ.setdefault(_NO_REPORTS, "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        import ray
    except ImportError:
        raise ClusterError(f"{ADDRESS} is set without Ray: install the extra `ray`, or unset it") from None
    if ray.is_initialized():
        return ray
    address = os.environ[ADDRESS]
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        cores = len(os.sched_getaffinity(0))
        options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    for attempt in range(_START_ATTEMPTS):
        try:
            with _own_signals(), _lean_path():
                _check_answers(address)
                ray.init(address=address, **options)
            return ray
        except Exception as error:  # its makers raise bare ones
            ray.shutdown()
            # On a busy machine Ray gives its own helpers up after 15 s: github.com/ray-project/ray/issues/65983
            if address != LOCAL or attempt == _START_ATTEMPTS - 1:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise ClusterError(f"{ADDRESS} = {address}: no cluster can be used ({reason}): {_ADVICE}") from error
    raise AssertionError("the last attempt returned or raised")


def _check_answers(address: str) -> None:
    """Raise an OSError where nothing listens at host:port, for which Ray would look for two minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()


@contextmanager
def _lean_path() -> Iterator[None]:
    """Let Ray's processes that start in the body not import what makes them slow."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = lean_path(os.environ)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of a run's signals, which Ray puts its own in the place of."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
