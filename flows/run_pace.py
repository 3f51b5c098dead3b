"""How long a run of `sft run` took beside its stages, noted for later plans."""

from schemas.artifacts import RunReport
from tasks import speeds

REST = "start, compare, register"
_STAGES = ("ingest", "tokenize", "evaluate_base", "train", "merge", "evaluate_merged", "evaluate_champion")
"""Of the report's durations, those that their own doors note."""


def note_rest(report: RunReport, lived_seconds: float) -> None:
    """Note what of a process's life went into the start, and into the stages whose time depends on no size.

    Args:
        report: of the run.
        lived_seconds: of the process.
    """
    stages = sum(seconds for stage, seconds in report.durations_seconds.items() if stage in _STAGES)
    speeds.note(speeds.Speed(REST, 1, max(lived_seconds - stages, 1e-3), speeds.name_device()))
