"""What is kept of a pipeline run besides its results: its log, and the environment that it ran in."""

import logging
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks import tracking

logger = logging.getLogger(__name__)

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "flows", "tasks")


@contextmanager
def keep_log(run_id: str) -> Iterator[None]:
    """Write what the run logs in this process into `logs/`, and give it to the MLflow run, however the run ends.

    Each attempt has a file of its own. What a stage logs on the GPU pool is on its own page in Prefect.
    """
    with TemporaryDirectory(prefix="sft-log-") as folder:
        number = len(tracking.list_files(run_id, "logs"))
        file = Path(folder) / f"run-{number + 1}.log"
        handler = logging.FileHandler(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s  %(levelname)-7s  %(message)s"))
        with ExitStack() as stack:
            for name in _LOGGERS:
                logging.getLogger(name).addHandler(handler)
                stack.callback(logging.getLogger(name).removeHandler, handler)
            try:
                yield
            finally:
                handler.close()
                try:
                    tracking.log_file(run_id, file, "logs")
                except Exception as error:  # the run's own outcome counts, and not what its log met
                    logger.warning("The log of this run could not be kept with MLflow run %s: %s", run_id, error)


def describe_environment() -> str:
    """Return Python, system and every installed distribution with its version, as a requirements file has them."""
    found = sorted({f"{each.metadata['Name']}=={each.version}" for each in distributions()}, key=str.lower)
    return "\n".join([f"# Python {platform.python_version()} on {platform.platform()}", *found]) + "\n"
