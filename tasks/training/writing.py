"""Writes checkpoints in a thread, so that the training goes on meanwhile."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from tasks.training.checkpoints import Snapshot, write_snapshot
from tasks.training.place import Place
from tasks.training.shared_checkpoints import share_checkpoint


class CheckpointWriter:
    """At most one checkpoint is being written; an error surfaces at the next `check`, `write` or `finish`."""

    def __init__(self, folder: Path, *, keep: int, place: Place | None = None) -> None:
        """Begin.

        Args:
            folder: of this machine.
            keep: the newest so many, and the best one.
            place: that gets them too, if any.
        """
        self._folder = folder
        self._keep = keep
        self._place = place
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._current: Future[Path] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the one being written; its error counts only where there is no other."""
        self._pool.shutdown(wait=True)
        if error is None:
            self.finish()

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write, after the one before is done."""
        self.finish()
        self._current = self._pool.submit(self._write, snapshot)

    def check(self) -> None:
        """Raise the error of a checkpoint that failed since."""
        if self._current is not None and self._current.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint is on the disk, and in the place that machines share.

        Raises:
            CheckpointError: it cannot be written.
        """
        current, self._current = self._current, None
        if current is not None:
            current.result()

    def _write(self, snapshot: Snapshot) -> Path:
        path = write_snapshot(snapshot, self._folder, keep=self._keep)
        if self._place is not None:
            share_checkpoint(self._place, path)
        return path
