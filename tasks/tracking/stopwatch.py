"""Measures how many seconds of a stage are spent on tracking."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_spent: ContextVar[list[float] | None] = ContextVar("spent", default=None)


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Give a list of one number: the seconds that `tracking_time` counted inside, in this thread."""
    spent = [0.0]
    token = _spent.set(spent)
    try:
        yield spent
    finally:
        _spent.reset(token)


@contextmanager
def tracking_time() -> Iterator[None]:
    """Count what happens here as tracking, once where such blocks lie in each other. Also a decorator."""
    spent = _spent.get()
    if spent is None:
        yield
        return
    token = _spent.set(None)
    start = time.perf_counter()
    try:
        yield
    finally:
        spent[0] += time.perf_counter() - start
        _spent.reset(token)
