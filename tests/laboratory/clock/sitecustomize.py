"""Lets Python sleep under libfaketime 0.9.10 with the monotonic clock left alone, where its own sleeps fail."""

import select
import time
from typing import SupportsFloat


def _sleep(seconds: SupportsFloat) -> None:
    if float(seconds) < 0:
        raise ValueError("sleep length must be non-negative")
    select.select([], [], [], float(seconds))


time.sleep = _sleep  # type: ignore[assignment]
