"""The console script `sft`. Heavy libraries are imported inside the commands, so that help is instant."""

import json
import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from schemas.loading import ConfigError, load_config, override_config

app = typer.Typer(
    name="sft",
    help="Fine-tune language models in a way that people can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_DEMO_MODEL = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "base_model"
_console = Console(stderr=True, highlight=False)


@app.callback()
def _callback() -> None:
    """Fine-tune language models in a way that people can trust."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML config, such as deploy/configs/demo.yaml.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.field=value. Repeatable.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the run report as JSON here.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on with an interrupted run of this config; never; or an MLflow run id.")
    ] = "auto",
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Reuse results of unchanged stages.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log lines too.")] = False,
) -> None:
    """Run the pipeline: dataset and base model in, registered and evaluated model out."""
    try:
        loaded = load_config(config, tuple(set_ or ()))
    except ConfigError as error:
        _fail(error)
    _prepare_environment(cache=cache)
    from flows.temporary_server import starting_server

    with starting_server():
        from flows.pipeline import sft_pipeline
        from flows.terminal import quiet_prefect, show_outcome, write_failure
    if not verbose:
        quiet_prefect()

    try:
        outcome = sft_pipeline(loaded, resume=resume)
    except KeyboardInterrupt:
        _console.print("[yellow]Interrupted.[/] The same command goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    except Exception as error:
        if report is not None:
            write_failure(report, error)
        if not isinstance(error, ValueError):
            _console.print_exception()
        _fail(error)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(outcome.model_dump_json(indent=2) + "\n", encoding="utf-8")
    show_outcome(outcome)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="File, folder or hub name of a dataset.")],
    config: Annotated[Path | None, typer.Option(help="YAML config whose settings and tokenizer are used.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.field=value. Repeatable.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write what was found as JSON here.")] = None,
) -> None:
    """Validate a dataset and show what would be trained, without training. Exit code 1 when a budget is broken."""
    source = {"data": {"source": data}}
    try:
        if config is None:
            loaded = override_config({"model": {"base_model": str(_DEMO_MODEL)}, **source}, tuple(set_ or ()))
        else:
            loaded = load_config(config, (f"data.source={json.dumps(data)}", *(set_ or ())))
    except ConfigError as error:
        _fail(error)
    _prepare_environment(cache=True)
    from flows.checking import check_dataset
    from flows.terminal import show_check

    try:
        found = check_dataset(loaded.data, loaded.model, loaded.tokenization, seed=loaded.seed)
    except ValueError as error:
        _fail(error)
    if json_ is not None:
        json_.parent.mkdir(parents=True, exist_ok=True)
        json_.write_text(found.to_json(), encoding="utf-8")
    show_check(found, data)
    if config is None:
        _console.print("[dim]Tokens are counted with the demo's tokenizer; give --config for your model's.[/]")
    if found.problems:
        raise typer.Exit(1)


def _fail(error: Exception) -> NoReturn:
    """Print one readable message and leave with exit code 1."""
    _console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    _console.print(str(error), markup=False, soft_wrap=True)
    raise typer.Exit(1)


def _prepare_environment(*, cache: bool) -> None:
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


def main() -> None:
    """Run the console script."""
    app()


if __name__ == "__main__":
    main()
