"""How a machine joins a training whose run is on another one, and stays with it until it is over."""

import logging
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from tasks.training.place import Place
from tasks.training.process.elastic import write_torchrun
from tasks.training.process.launch import run_training
from tasks.training.process.messages import TrainingJob, write_job
from tasks.training.process.team import Offer, answers, find_offer, take_offer
from tasks.training.records import TrainingCrash, TrainingStopped

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
_MOST_CRASHES = 3
"""In a row, while the run's machine answers."""


class NobodyCameError(ValueError):
    """No training was offered in the time that was given."""


def join_team(
    place: Place,
    folder: Path,
    *,
    wait_seconds: float,
    on_log: Callable[[int, str], None] = logger.log,
    stop_seconds: float | None = None,
) -> int:
    """Train with others until no training is offered any more; return in how many this machine has taken part.

    A machine that loses the others looks for them again: the run may go on elsewhere.

    Args:
        place: that the machines share.
        folder: of this machine, for models, tokens and checkpoints.
        wait_seconds: for a training that is offered, and answers; also after one was lost.
        on_log: gets level and text of log lines.
        stop_seconds: as for `run_training`.

    Raises:
        NobodyCameError: nobody offered a training.
        TrainingError: what it raised here would come again.
        TrainingCrash: this machine's processes failed again and again.
    """
    finished: set[str] = set()
    num_crashes = 0
    while (offer := _wait_for_offer(place, wait_seconds, on_log, has_trained=bool(finished))) is not None:
        job = take_offer(place, offer, folder)
        try:
            run_training(job, on_log=on_log, in_place=False, stop_seconds=stop_seconds)
            num_crashes = 0
            finished.add(offer.name)
            _wait_until_over(place, offer)
        except (TrainingCrash, TrainingStopped) as error:
            current = find_offer(place)
            if current is None or current.name != offer.name:
                finished.add(offer.name)  # it was finished without us
                continue
            num_crashes = num_crashes + 1 if answers(current) else 0
            if num_crashes >= _MOST_CRASHES:
                raise
            on_log(logging.WARNING, f"Looking for the others again: {str(error).partition(chr(10))[0]}")
            time.sleep(_LOOK_SECONDS)
    return len(finished)


def prepare_command(place: Place, folder: Path, *, wait_seconds: float) -> str:
    """Fetch what a training needs, and return torchrun's command for this machine.

    Raises:
        NobodyCameError, TrainingError: as `join_team`.
    """
    offer = _wait_for_offer(place, wait_seconds, logger.log, has_trained=False)
    assert offer is not None
    job = take_offer(place, offer, folder)
    return shlex.join(write_torchrun(job, _write(job)))


def _write(job: TrainingJob) -> Path:
    job.run_folder.mkdir(parents=True, exist_ok=True)
    path = job.run_folder / "job.json"
    write_job(job, path)
    return path


def _wait_for_offer(
    place: Place, seconds: float, on_log: Callable[[int, str], None], *, has_trained: bool
) -> Offer | None:
    """Return a training that is offered and whose run answers; None where this machine has trained and none is left.

    Raises:
        NobodyCameError: there is none in time.
    """
    deadline = time.monotonic() + seconds
    is_told = False
    while True:
        offer = find_offer(place)
        if offer is None and has_trained:
            return None
        if offer is not None and answers(offer):
            return offer
        if time.monotonic() > deadline:
            what = (
                f"the run at {offer.endpoint} does not answer: look at its machine"
                if offer is not None
                else "no training was offered there: start a run with training.num_nodes above 1 and the same SFT_TEAM"
            )
            raise NobodyCameError(f"{place.address}: waited {seconds:.0f} s, and {what}")
        if not is_told:
            on_log(logging.INFO, f"Waiting for a training at {place.address}")
            is_told = True
        time.sleep(_LOOK_SECONDS)


def _wait_until_over(place: Place, offer: Offer, *, seconds: float = 600.0) -> None:
    """Wait until a training that has ended here is no longer offered: its run is still fetching what came out."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        current = find_offer(place)
        if current is None or current.name != offer.name:
            return
        time.sleep(_LOOK_SECONDS)
