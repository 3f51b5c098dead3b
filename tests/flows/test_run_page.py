"""A run's page has an error of ours once and without a trace, a defect with its trace, and warnings of any thread."""

import logging
from collections.abc import Iterator
from threading import Thread
from uuid import uuid4

import pytest
from prefect.logging.handlers import APILogHandler

from flows.run_page import prepare_page
from tasks.ingestion.errors import DataError

_NAMES = ("flows", "tasks", "schemas", "prefect.flow_runs", "prefect.task_runs")


class Page(logging.Handler):
    """Keeps what Prefect's own handler would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, bool]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.getMessage(), record.exc_info is not None))


@pytest.fixture
def page() -> Iterator[Page]:
    loggers = [logging.getLogger(name) for name in _NAMES]
    before = [(list(each.handlers), list(each.filters)) for each in loggers]
    page = Page()
    for each in loggers[3:]:
        each.handlers, each.filters = [page], []
    yield page
    for each, (handlers, filters) in zip(loggers, before, strict=True):
        each.handlers, each.filters = handlers, filters


def fail(error: Exception) -> None:
    """Log an error as Prefect's engine does: of the task, of the flow, and of itself."""
    try:
        raise error
    except Exception as caught:
        logging.getLogger("prefect.task_runs").exception("Task run failed with exception: %r", caught)
        logging.getLogger("prefect.flow_runs").exception("Encountered exception during execution: %r", caught)
        logging.getLogger("prefect.flow_runs").error("Engine execution exited with unexpected exception", exc_info=True)


def test_an_error_of_ours_is_said_once_and_a_defect_keeps_its_traces(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_page()  # no run's process
    fail(DataError("rows.jsonl: empty"))
    assert [has_trace for _, has_trace in page.lines] == [True, True, True]
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid4()))
    prepare_page()
    page.lines.clear()
    fail(DataError("rows.jsonl:\n  2 rows are empty"))
    fail(KeyError("x"))
    assert page.lines == [
        ("DataError: rows.jsonl:\n  2 rows are empty", False),
        ("Task run failed with exception: KeyError('x')", True),
        ("Encountered exception during execution: KeyError('x')", True),
        ("Engine execution exited with unexpected exception", True),
    ]


def test_warnings_of_the_stages_belong_to_the_run_whichever_thread_has_them(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = str(uuid4())
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", run_id)
    sent: list[logging.LogRecord] = []
    monkeypatch.setattr(APILogHandler, "emit", lambda handler, record: sent.append(record))
    prepare_page()
    logger = logging.getLogger("tasks.storage")
    thread = Thread(target=logger.warning, args=("the cache is full",))
    thread.start()
    thread.join()
    logger.info("nothing for people")
    assert [(record.getMessage(), getattr(record, "flow_run_id", None)) for record in sent] == [
        ("the cache is full", run_id)
    ]
