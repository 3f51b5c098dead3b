"""Work of constant shape on a GPU, recorded once and replayed (CUDA graphs)."""

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress

import torch

logger = logging.getLogger(__name__)


class Recorder:
    """Recordings that share their memory: they never run at the same time, and each overwrites what another left."""

    def __init__(self, device: torch.device) -> None:
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._can_record = True

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do some work: the first time from the host, so that every kernel is compiled, and then from a recording.

        Args:
            key: names the work and all shapes in it.
            work: reads and writes tensors that stay where they are, and never waits for the device.
        """
        graph = self.graphs.get(key)
        if graph is None and key in self._seen and self._can_record:
            graph = self._record(key, work)
        self._seen.add(key)
        if graph is None:
            work()
        else:
            graph.replay()

    def _record(self, key: Hashable, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Record the work without doing it; None where that fails, and nothing more is recorded then."""
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
            self._can_record = False
            logger.warning(
                "A pass of this model cannot be recorded, so that small steps wait for the host: %s",
                str(error).partition("\n")[0],
            )
            return None
        self.graphs[key] = graph
        return graph
