"""Keeps Python's cyclic garbage collector from walking through objects that are never freed.

Each of its full passes looks at every object there is: a tokenizer's vocabulary read as JSON brings half a million.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Keep the collector from running while many objects come to stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Import in the body: the collector does not run meanwhile, nor does it look at what came, then or at exit.

    Modules stay until the process ends. Passes through them are a sixth of the time that torch, transformers, Prefect
    and MLflow take to import, each explicit pass after it takes half a second, and those at exit take seconds.
    """
    with paused():
        yield
    gc.freeze()
    skip_passes_at_exit()


def skip_passes_at_exit() -> None:
    """Let the process end without passes over all objects: its memory is given back as a whole."""
    atexit.unregister(gc.freeze)  # once is enough
    atexit.register(gc.freeze)


def freeze_heap() -> None:
    """Take all that is there now out of further passes, after a last one over it and what was kept before."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
