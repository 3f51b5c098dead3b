"""Checkpoints in a place that machines share: whoever comes goes on from the newest one, in a folder of its own."""

import json
import logging
import shutil
from pathlib import Path

from tasks.training.checkpoints import STATE, find_damage, list_checkpoints, name_checkpoint, read_step
from tasks.training.distributed import run_on_rank0, run_once_per_node
from tasks.training.place import DamageError, Place

logger = logging.getLogger(__name__)

_FOLDER = "checkpoints"
_RESULT = "result"


def bring_checkpoints(place: Place, folder: Path, *, with_best: bool) -> list[str]:
    """Make the checkpoints of each machine those of the place: the newest whole one, and the best one up to there.

    Args:
        place: of the training.
        folder: of this machine, for its checkpoints; others in it are deleted: a team that lost this machine went on
            from an older one.
        with_best: the best one is wanted too.

    Returns:
        A warning for each damaged one passed over.

    Raises:
        PlaceError: the place cannot be read.
    """
    names, warnings = run_on_rank0(lambda: _choose(place, folder, with_best=with_best))

    def bring() -> None:
        for path in list_checkpoints(folder):
            if path.name not in names:
                shutil.rmtree(path)
        for name in names:
            place.fetch_folder(f"{_FOLDER}/{name}", folder / name)

    run_once_per_node(bring)
    return warnings


def share_checkpoint(place: Place, path: Path) -> None:
    """Put a checkpoint there, and delete those that this machine has deleted.

    Raises:
        PlaceError: it cannot be written.
    """
    place.put_folder(path, f"{_FOLDER}/{path.name}")
    kept = {each.name for each in list_checkpoints(path.parent)}
    for name in place.list_names(_FOLDER):
        if name not in kept:
            place.remove(f"{_FOLDER}/{name}")


def share_result(place: Place, folder: Path) -> None:
    """Put what was trained there, for the machine of the pipeline's run."""
    place.put_folder(folder, _RESULT)


def fetch_result(place: Place, folder: Path) -> None:
    """Fetch what was trained.

    Raises:
        PlaceError: it is not there, or damaged.
    """
    place.fetch_folder(_RESULT, folder)


def _choose(place: Place, folder: Path, *, with_best: bool) -> tuple[list[str], list[str]]:
    """Return the names of the checkpoints to go on with, which this machine then has, and warnings."""
    warnings: list[str] = []
    found = [name for name in place.list_names(_FOLDER) if read_step(Path(name)) is not None]
    for name in sorted(found, key=lambda name: -(read_step(Path(name)) or 0)):
        if place.list_files(f"{_FOLDER}/{name}") is None:  # its writer was lost
            continue
        try:
            names = [name]
            place.fetch_folder(f"{_FOLDER}/{name}", folder / name)
            if damage := find_damage(folder / name):
                raise DamageError(f"{place.address}/{_FOLDER}/{name}: {damage}")
            best = _read_best(folder / name) if with_best else None
            if best is not None and best != read_step(folder / name):
                names.append(name_checkpoint(folder, best).name)
                place.fetch_folder(f"{_FOLDER}/{names[-1]}", folder / names[-1])
            return names, warnings
        except DamageError as error:
            warnings.append(f"checkpoint {name} is damaged ({error}) and was passed over for an older one")
            logger.warning(warnings[-1])
    return [], warnings


def _read_best(path: Path) -> int | None:
    """Return the step of the smallest evaluation loss up to a checkpoint."""
    progress = json.loads((path / STATE).read_text(encoding="utf-8"))["progress"]
    return max((record["step"] for record in progress["evaluations"] if record["is_best"]), default=None)
