"""What a training lost, over all attempts of its run: a run that goes on later has had these losses too.

They are kept in the run's folder and, where machines share a place, there: another machine may go on with the run.
"""

import json
import logging
from pathlib import Path

from tasks.training.place import Place, PlaceError, open_place
from tasks.training.process.messages import TrainingJob

logger = logging.getLogger(__name__)

_FILE = "losses.json"


def note_loss(job: TrainingJob, sentence: str) -> None:
    """Keep a sentence on a loss, for the warnings of the training when it comes to its end."""
    losses = json.dumps([*read_losses(job), sentence])
    place = _find_place(job)
    if place is not None:
        try:
            place.write_text(_FILE, losses)
        except PlaceError as error:  # the training goes on, and so does the folder's file
            logger.warning("The loss is noted on this machine alone: %s", error)
    partial = _find_file(job).with_suffix(".partial")
    partial.write_text(losses, encoding="utf-8")
    partial.replace(_find_file(job))


def read_losses(job: TrainingJob) -> tuple[str, ...]:
    """Return the losses of all attempts, the oldest first; of this machine's where the place cannot be read."""
    file, place = _find_file(job), _find_place(job)
    here = _parse(file.read_text(encoding="utf-8") if file.exists() else None)
    if place is None:
        return here
    try:
        there = _parse(place.read_text(_FILE))
    except PlaceError as error:  # what was trained is whole
        logger.warning("Losses of earlier attempts on other machines are not known: %s", error)
        return here
    return there if len(there) > len(here) else here  # each holds what was known before: the longer one holds both


def _parse(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(json.loads(text))


def _find_file(job: TrainingJob) -> Path:
    return job.run_folder / _FILE


def _find_place(job: TrainingJob) -> Place | None:
    return None if job.place is None else open_place(job.place)
