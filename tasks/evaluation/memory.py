"""Repeats an evaluation's work in smaller batches when the memory runs out."""

import gc
import logging
from collections.abc import Callable

import torch

from tasks.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)


def shrink_until_it_fits(work: Callable[[int], None], size: int, *, name: str, smallest: int = 1) -> int:
    """Call `work` with a size, and with half of it again and again while memory runs out; return the size that did.

    Args:
        work: does what is left to do; what it has done before it fails stays done.
        size: to begin with.
        name: of the size, for the line that says that it was halved.
        smallest: size; where this does not fit either, the error is raised.
    """
    while True:
        try:
            work(size)
            return size
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if size <= smallest or not is_out_of_memory(error):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = max(smallest, size // 2)
        logger.warning("Out of memory: going on with %s %d", name, size)
