"""Work of constant shape on a GPU, recorded once and replayed (CUDA graphs)."""

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress

import torch

_MOST_FAILURES = 8

logger = logging.getLogger(__name__)


class Recorder:
    """Recordings that share their memory: they never run at the same time, and each overwrites what another left."""

    def __init__(self, device: torch.device) -> None:
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._is_warm = False
        self._num_failures = 0
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do some work from its recording, which is made first; the very first work of all is done from the host.

        Libraries set themselves up, and kernels are compiled, in the first one.

        Args:
            key: names the work and all shapes in it.
            work: reads and writes tensors that stay where they are, and never waits for the device.
        """
        graph = self.graphs.get(key)
        if graph is None and self._is_warm and self._num_failures < _MOST_FAILURES:
            graph = self._record(key, work)
        self._is_warm = True
        if graph is None:
            work()
        else:
            graph.replay()

    def _record(self, key: Hashable, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Record the work without doing it; None where that fails, and after a few failures nothing more is tried."""
        # Not `torch.cuda.graph`: it collects garbage and empties the allocator's cache each time.
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except RuntimeError as error:
            self._num_failures += 1
            self._pool = torch.cuda.graph_pool_handle()  # the other one may still be open
            logger.debug("Not recorded: %s", error)
            if self._num_failures == _MOST_FAILURES:
                logger.warning(
                    "Passes of this model cannot be recorded, so that small steps wait for the host: %s",
                    str(error).partition("\n")[0],
                )
            return None
        self.graphs[key] = graph
        return graph
