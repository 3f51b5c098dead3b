"""Turns the errors of a training's processes into the one error that the launcher raises."""

import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.training.records import TrainingCrash, TrainingError

_TAIL_LINES = 20
_MAX_CHARACTERS = 200
_PLACE = re.compile(r"^\[[^\s\]]*:\d+\]\s*")
"""A file and line in a library's sources, with which gloo and NCCL begin what they say."""


def choose_error(errors: Sequence[Mapping[str, str]], log: Path) -> Exception:
    """Return the error that names a cause: of our own kinds, before those of processes that lost a peer.

    Args:
        errors: type, message and traceback of what each process raised, in the order in which they were told.
        log: of the processes.
    """
    kinds = _known_errors()
    error = next((error for error in errors if error["type"] in kinds), errors[0])
    if error["type"] in kinds:
        return kinds[error["type"]](error["message"])
    lost = next((error for error in errors if error["type"] == TrainingCrash.__name__), None)
    if lost is not None:  # of the agent, which knows which process the others lost
        return TrainingCrash(f"{lost['message']}{read_tail(log)}")
    return TrainingCrash(
        f"the training failed with {error['type']}: {error['message']}\n{error['traceback']}(log: {log})"
    )


def shorten_message(message: str) -> str:
    """Return the first sentence of an error's message, without the place in a library's sources, to stand in a line."""
    line = next(iter(message.strip().splitlines()), "")
    sentence = _PLACE.sub("", line).split(". ")[0].removesuffix(".")
    return sentence if len(sentence) <= _MAX_CHARACTERS else sentence[:_MAX_CHARACTERS].rsplit(" ", 1)[0] + " …"


def is_known(error: Mapping[str, str]) -> bool:
    """Say whether an error is for the user to mend: it would come again, wherever the training goes on."""
    return error["type"] in _known_errors()


def name_lost_rank(local_rank: int, number: int, code: int) -> str:
    """Say which of a machine's processes was killed.

    Args:
        local_rank: of the process, from 0; on a machine with GPUs the GPU's number, too.
        number: processes of this machine.
        code: exit code, negative: a signal.
    """
    return f"process {local_rank + 1} of {number} (local rank {local_rank}) of the training {name_end(code)}"


def name_end(code: int | None) -> str:
    """Say how a process ended that had no outcome, from its exit code (negative: a signal; None: it lives)."""
    if code is None:
        return "did not end"
    if code >= 0:
        return f"ended with exit code {code} without an outcome"
    cause = ", perhaps by the kernel because the machine's memory was used up" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{cause}. The same command goes on from the last checkpoint"


def read_tail(log: Path) -> str:
    """Return the end of the processes' log, to stand at the end of a message."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    except OSError:
        return ""
    return f" (log: {log})" + "".join(f"\n  {line}" for line in lines)


def _known_errors() -> dict[str, type[Exception]]:
    """Return the errors that come back as they were raised; a full GPU is for the user to mend, too."""
    from tasks.models import ModelError
    from tasks.training.checkpoints import CheckpointError
    from tasks.training.place import DamageError, PlaceError

    ours = (TrainingError, CheckpointError, PlaceError, DamageError, ModelError)
    kinds: dict[str, type[Exception]] = {kind.__name__: kind for kind in ours}
    return {**kinds, "OutOfMemoryError": TrainingError}
