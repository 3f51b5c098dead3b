"""What Prefect, MLflow and the model libraries read from the environment at import, in commands and in workers."""

import os

from tasks.sqlite_files import make_address
from tasks.storage import home

DATABASE_VARIABLE = "PREFECT_API_DATABASE_CONNECTION_URL"


def run_defaults() -> dict[str, str]:
    """Return the variables of every process that runs stages; what a user has set goes before them."""
    # Of the temporary server of runs without one; `PREFECT_HOME=$SFT_HOME/prefect prefect server start` shows it.
    database = {DATABASE_VARIABLE: make_address(home() / "prefect" / "prefect.db", driver="aiosqlite")}
    return {
        **(database if "PREFECT_HOME" not in os.environ else {}),
        "PREFECT_LOCAL_STORAGE_PATH": str(home() / "results"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        # Waiting threads sleep: on a busy machine spinning ones can cost an order of magnitude.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TRANSFORMERS_VERBOSITY": "error",
    }
