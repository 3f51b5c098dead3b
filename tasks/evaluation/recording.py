"""Steps of constant shape, recorded once on a GPU and replayed (CUDA graphs)."""

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

Step = Callable[..., None]
"""Reads and writes tensors that stay where they are; its arguments are its shape."""


class StepRecorder:
    """Recordings of a step, one a shape, that share their memory: they never run at the same time."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._can_record = True

    def run(self, step: Step, *shape: int) -> None:
        """Do a step: the first time of a shape from the host, then from its recording."""
        graph = self.graphs.get(shape)
        if graph is not None:
            graph.replay()
            return
        if not self._can_record:
            step(*shape)
            return
        # Beside the default stream, as a recording will be: what libraries set up at their first call is then there.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(*shape)
        torch.cuda.current_stream().wait_stream(stream)
        self._record(step, shape)

    def _record(self, step: Step, shape: tuple[int, ...]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                step(*shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._can_record = False
            logger.warning("A step of this model cannot be recorded, so that decoding is slower: %s", error)
            return
        self.graphs[shape] = graph
