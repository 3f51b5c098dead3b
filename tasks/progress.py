"""Logs from time to time how much of long work is done."""

import logging
import time
from collections.abc import Callable

EVERY_SECONDS = 20.0

Tell = Callable[[int, int], None]
"""Told the units of work that are done, and all."""


def log_progress(
    log: logging.Logger | logging.LoggerAdapter[logging.Logger],
    done: str = "Evaluated",
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Tell:
    """Return a function that is told the units of work done and all of them, and logs them every EVERY_SECONDS.

    Work that is shorter logs nothing.

    Args:
        log: where the lines go.
        done: what is done, as the line begins.
        clock: returns seconds.
    """
    start = last = clock()

    def tell(num_done: int, num_all: int) -> None:
        nonlocal last
        now = clock()
        if now - last < EVERY_SECONDS or not 0 < num_done < num_all:
            return
        last = now
        left = (now - start) * (num_all - num_done) / num_done
        log.info("%s %.0f %%, about %.0f s to go", done, 100 * num_done / num_all, left)

    return tell
