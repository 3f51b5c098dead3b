"""What the page of a run in Prefect says, where a worker has started it: warnings of the stages, and errors once."""

import logging

from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run

_OWN = ("flows", "tasks", "schemas")
"""Packages whose errors are sentences for people."""
_RUNS = ("prefect.flow_runs", "prefect.task_runs")


def prepare_page() -> None:
    """Send our warnings to the page of this process's run, and say an error of ours there in its own words, once.

    Does nothing in a process that no worker has started for a run.
    """
    run_id = flow_run.id
    if run_id is None:
        return
    handler = APILogHandler(logging.WARNING)
    handler.addFilter(_RunNamer(str(run_id)))
    for name in _OWN:
        logging.getLogger(name).addHandler(handler)
    once = _Once()
    for name in _RUNS:
        logging.getLogger(name).addFilter(once)


class _RunNamer:
    """Names the run to records of threads that Prefect does not know."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def filter(self, record: logging.LogRecord) -> bool:
        record.flow_run_id = getattr(record, "flow_run_id", None) or self._run_id
        return True


class _Once:
    """Lets an error of ours through without its trace, and only the first time: task, flow and engine each log it."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or type(error).__module__.partition(".")[0] not in _OWN:
            return True
        sentence = f"{type(error).__name__}: {error}"
        is_new = sentence not in self._said
        self._said.add(sentence)
        record.msg, record.args, record.exc_info, record.exc_text = sentence, None, None, None
        return is_new
