"""A lock on a registered model that holds across processes and machines, with nothing but MLflow.

MLflow has no compare-and-set. What it has is a name that only one can take: its databases refuse a second registered
model of the same name. So the lock is an empty registered model that exists while it is held. A holder that died
leaves it behind; whoever has waited longer than any holder may take renames it away, and since the new name is made
from the dead holder's token, of several that try only one succeeds.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import mlflow

from tasks import tracking

LEASE_SECONDS = 60.0
"""A holder that has not let go by then is taken for dead; a move takes well under a second."""
_POLL_SECONDS = 0.1
_TOKEN, _HOLDER, _SINCE = "sft.token", "sft.holder", "sft.since"
_TAKEN = ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")  # the second where it went away in between


class LockError(ValueError):
    """Somebody else is at work on the registered model."""


@contextmanager
def hold(name: str, *, holder: str, lease_seconds: float = LEASE_SECONDS) -> Iterator[Callable[[], None]]:
    """Hold the lock of a registered model; give a function that raises when the lease may be over.

    Call it before each write. Waits at most twice the lease.

    Args:
        name: what is locked.
        holder: who holds it, for those who wait.
        lease_seconds: the same for all who use the lock.

    Raises:
        LockError: others held it all the time, or the lease is over.
    """
    token = uuid.uuid4().hex
    start = _take(_lock_name(name), name, token, holder, lease_seconds)

    def check() -> None:
        if time.monotonic() - start > lease_seconds / 2:
            raise LockError(
                f"{name}: this change took longer than {lease_seconds / 2:g} s, so that another may have begun; "
                "nothing more is written: look at the registry and repeat it"
            )

    try:
        yield check
    finally:
        if _read(_lock_name(name)).get(_TOKEN) == token:
            tracking.client().delete_registered_model(_lock_name(name))


def _lock_name(name: str) -> str:
    return f"sft-lock.{name}"


def _take(lock: str, name: str, token: str, holder: str, lease_seconds: float) -> float:
    """Wait for the lock and return when it was taken, on the monotonic clock."""
    begin = seen_since = time.monotonic()
    seen: str | None = None
    tags = {_TOKEN: token, _HOLDER: holder, _SINCE: datetime.now(UTC).isoformat(timespec="seconds")}
    while True:
        start = time.monotonic()
        if _create(lock, tags):
            return start
        found = _read(lock)
        if found.get(_TOKEN) == token:  # the answer to our own request was lost, and it was sent again
            return start
        if found.get(_TOKEN) != seen:
            seen, seen_since = found.get(_TOKEN), start
        elif seen is not None and start - seen_since > lease_seconds:
            _put_away(lock, seen)
        if start - begin > 2 * lease_seconds:
            raise LockError(
                f"{name}: {found.get(_HOLDER, 'somebody')} has been changing it since {found.get(_SINCE, 'just now')}: "
                "wait and repeat"
            )
        time.sleep(_POLL_SECONDS)


def _create(lock: str, tags: dict[str, str]) -> bool:
    try:
        tracking.client().create_registered_model(
            lock, tags=tags, description="Held while an alias moves; gone a moment later."
        )
    except mlflow.MlflowException as error:
        if error.error_code in _TAKEN:
            return False
        raise
    return True


def _read(lock: str) -> dict[str, str]:
    try:
        return dict(tracking.client().get_registered_model(lock).tags)
    except mlflow.MlflowException as error:
        if error.error_code in _TAKEN:
            return {}
        raise


def _put_away(lock: str, token: str) -> None:
    """Take the lock from a dead holder. What is left says so and may be deleted by hand."""
    try:
        tracking.client().rename_registered_model(lock, f"{lock}.left-{token}")
    except mlflow.MlflowException as error:
        if error.error_code not in _TAKEN:  # another was faster
            raise
