"""What the commands of `sft` share: messages, the environment of a run, and a config for one dataset."""

import json
import os
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

from schemas.config import RunConfig
from schemas.loading import ConfigError, load_config, override_config

_DEMO_MODEL = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "base_model"
console = Console(stderr=True, highlight=False)


def fail(error: Exception) -> NoReturn:
    """Print one readable message and leave with exit code 1."""
    console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    console.print(str(error), markup=False, soft_wrap=True)
    raise typer.Exit(1)


def prepare_environment(*, cache: bool) -> None:
    """Set what Prefect and the model libraries read at import; what the user has set stays."""
    from tasks.storage import home

    defaults = {
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
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not cache:
        os.environ["PREFECT_TASKS_REFRESH_CACHE"] = "true"


def load_for_data(data: str, config: Path | None, set_: list[str] | None) -> RunConfig:
    """Return a config for one dataset: the given one, or the defaults with the demo's tokenizer."""
    overrides = tuple(set_ or ())
    try:
        if config is None:
            return override_config({"model": {"base_model": str(_DEMO_MODEL)}, "data": {"source": data}}, overrides)
        return load_config(config, (f"data.source={json.dumps(data)}", *overrides))
    except ConfigError as error:
        fail(error)
