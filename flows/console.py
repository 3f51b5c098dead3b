"""What the commands of `sft` share: messages, the environment of a run, and a config for one dataset."""

import errno
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import typer
from rich import markup
from rich.console import Console

from flows.environment import run_defaults
from schemas.config import RunConfig
from schemas.loading import ConfigError, load_config, override_config, quote_text
from tasks.storage import HomeError, make_home
from tasks.visible_text import make_visible

_DEMO_MODEL = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "base_model"
console = Console(stderr=True, highlight=False)


def escape(text: str) -> str:
    """Make a text safe for the terminal and for rich's markup."""
    return markup.escape(make_visible(text))


def fail(error: Exception) -> NoReturn:
    """Print one readable message and leave with exit code 1."""
    console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    console.print(make_visible(str(error)), markup=False, soft_wrap=True)
    raise typer.Exit(1)


def check_files(**files: Path | None) -> None:
    """End with a message where a file cannot be written, before the work whose result it gets.

    Args:
        files: by the option that names each.
    """
    for option, path in files.items():
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() or not os.path.lexists(path):
                _try_to_write(path)
            elif path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            fail(ConfigError(f"--{option.strip('_')} {path}: cannot be written ({reason}): give another file"))


def _try_to_write(path: Path) -> None:
    """Open a file for writing and leave it as it is, or is not."""
    is_new = not path.exists()
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()


def prepare_environment(*, cache: bool) -> None:
    """Set what Prefect and the model libraries read at import; what the user has set stays."""
    with suppress(OSError, HomeError):  # a command that writes nothing can do without; the others say it
        (make_home() / "prefect").mkdir(exist_ok=True)
    # FastAPI's words about Prefect's own API, which nobody here can act upon.
    warnings.filterwarnings("ignore", message="The 'alias' attribute with value")
    for name, value in run_defaults().items():
        os.environ.setdefault(name, value)
    if not cache:
        os.environ["PREFECT_TASKS_REFRESH_CACHE"] = "true"


def is_demo_model(config: RunConfig) -> bool:
    """Say whether a config has the model that `load_for_data` takes where none is named."""
    return config.model.base_model == str(_DEMO_MODEL)


def need_model(config: RunConfig) -> None:
    """End with a message where no model is named, and the demo's is not there: only a checkout has it."""
    if is_demo_model(config) and not _DEMO_MODEL.is_dir():
        fail(ConfigError("no model is named: give --config, or --set model.base_model=NAME with a folder or hub name"))


def load_for_data(data: str, config: Path | None, set_: list[str] | None) -> RunConfig:
    """Return a config for one dataset: the given one, or the defaults with the demo's tokenizer."""
    overrides = tuple(set_ or ())
    try:
        if config is None:
            return override_config({"model": {"base_model": str(_DEMO_MODEL)}, "data": {"source": data}}, overrides)
        return load_config(config, (f"data.source={quote_text(data)}", *overrides))
    except ConfigError as error:
        fail(error)
