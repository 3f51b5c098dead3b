"""Runs a training in a thread of this process, so that signals reach the main thread and interrupt no step halfway.

Signals reach the main thread only, which waits here and passes on what the training tells. Their handlers stay as they
are: Prefect knows a cancelled run from a crashed one by its own, and would take another for a crash.
"""

import contextvars
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from tasks.training.process.messages import TrainingJob
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingOutcome, TrainingStopped

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.2  # a signal that another thread took is noticed after so long
_TOLD = ("tasks.training", "tasks.decoder")
"""Whose lines are told from INFO on, as those of a training in a process of its own are."""


def train_in_place(
    job: TrainingJob,
    on_step: Callable[[StepRecord], None],
    on_eval: Callable[[EvalRecord], None],
    on_log: Callable[[int, str], None],
) -> TrainingOutcome:
    """Train in a thread, with the callbacks in this one; the training does not wait for them.

    What interrupts this thread (an exception of a signal's handler or of a callback) stops the training at its next
    step border, after a checkpoint, and is then raised on. A second interruption does not wait for that.
    """
    handover = _Handover()
    outcome: Future[TrainingOutcome] = Future()
    run = contextvars.copy_context().run
    thread = threading.Thread(
        target=run, args=(_train, job, on_step, on_eval, handover, outcome), name="training", daemon=True
    )
    with _telling(thread, lambda level, line: handover.send(partial(on_log, level), line)):
        thread.start()
        try:
            handover.forward()
        except BaseException:
            handover.stop()
            if outcome.done() and isinstance(error := outcome.exception(), TrainingError):
                logger.warning("While stopping the training: %s", error)
            raise
    return outcome.result()


@contextmanager
def _telling(thread: threading.Thread, tell: Callable[[int, str], None]) -> Iterator[None]:
    """Tell what a thread logs in the body; lines of threads that do not train go where they went."""
    with _lock:
        if not _teller.told:
            _teller.open()
        _teller.told[thread] = tell
    try:
        yield
    finally:
        with _lock:
            del _teller.told[thread]
            if not _teller.told:
                _teller.close()


class _Teller(logging.Handler):
    """Tells what the threads that train log, each to its own listener."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.told: dict[threading.Thread, Callable[[int, str], None]] = {}
        self._before: list[tuple[logging.Logger, int, bool]] = []

    def open(self) -> None:
        """Take over the loggers."""
        self._before = [(each, each.level, each.propagate) for each in map(logging.getLogger, _TOLD)]
        for each, *_ in self._before:
            each.addHandler(self)
            each.setLevel(logging.INFO)
            each.propagate = False

    def close(self) -> None:
        """Leave them as they were."""
        for each, level, propagate in self._before:
            each.removeHandler(self)
            each.setLevel(level)
            each.propagate = propagate

    def emit(self, record: logging.LogRecord) -> None:
        """Tell a line of a thread that trains, and give one of another to the logger above."""
        for thread, tell in list(self.told.items()):
            if thread.ident == record.thread:
                tell(record.levelno, record.getMessage())
                return
        above = logging.getLogger("tasks")
        if record.levelno >= above.getEffectiveLevel():
            above.handle(record)


_teller, _lock = _Teller(), threading.Lock()


def _train(
    job: TrainingJob,
    on_step: Callable[[StepRecord], None],
    on_eval: Callable[[EvalRecord], None],
    handover: "_Handover",
    outcome: "Future[TrainingOutcome]",
) -> None:
    from tasks.training.loop import train_adapter
    from tasks.training.place import open_place

    try:
        outcome.set_result(
            train_adapter(
                job.base_model,
                job.tokens,
                job.run_folder,
                job.config,
                seed=job.seed,
                identity=job.identity,
                place=None if job.place is None else open_place(job.place),
                tokens_address=job.tokens_address,
                on_step=partial(handover.send, on_step),
                on_eval=partial(handover.send, on_eval),
                should_stop=handover.should_stop,
            )
        )
    except BaseException as error:
        outcome.set_exception(error)
    finally:
        handover.close()


class _Handover:
    """Between the training's thread and the one that waits for it."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._interrupted: Callable[[], None] | None = None
        self._has_begun = threading.Event()
        self._is_stopping = threading.Event()
        self._is_left = threading.Event()

    def send(self, listener: Callable[[Any], None], record: Any) -> None:
        """Have the other thread call the listener."""
        self._told.put(partial(listener, record))

    def should_stop(self) -> bool:
        """Say whether a stop was asked for; raise TrainingStopped when nobody waits for the checkpoint either."""
        self._has_begun.set()
        if self._is_left.is_set():
            raise TrainingStopped("interrupted twice: no checkpoint was written")
        return self._is_stopping.is_set()

    def close(self) -> None:
        """Tell that nothing more will come."""
        self._told.put(None)

    def forward(self) -> None:
        """Call the listeners as told, until nothing more comes."""
        while (call := self._wait()) is not None:
            self._interrupted = call
            try:
                call()
            except Exception:
                self._interrupted = None
                raise
            self._interrupted = None

    def stop(self) -> None:
        """Ask the training to stop after a checkpoint, and wait; before its first step there is nothing to keep."""
        self._is_stopping.set()
        if not self._has_begun.is_set():
            self._is_left.set()
            return
        logger.warning("Stopping after a checkpoint; a second interruption would not wait for it")
        try:
            self._forward_the_rest()
        except BaseException:
            self._is_left.set()
            raise

    def _forward_the_rest(self) -> None:
        """Call the listener that was interrupted again, so that a curve has no hole, and those that follow."""
        call = self._interrupted or self._wait()
        while call is not None:
            try:
                call()
            except Exception as error:  # a listener that fails now must not keep the training from ending
                logger.warning("While stopping the training: %s", error)
            call = self._wait()

    def _wait(self) -> Callable[[], None] | None:
        while True:
            with suppress(queue.Empty):
                return self._told.get(timeout=_TICK_SECONDS)
