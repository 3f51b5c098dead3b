"""The console script `sft`. Heavy libraries are imported inside the commands, so that help is instant."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flows.around_cli import app as around_app
from flows.cleaning_cli import app as cleaning_app
from flows.config_options import ConfigFile, Overrides, Settings
from flows.console import (
    check_files,
    console,
    escape,
    fail,
    is_demo_model,
    load_for_data,
    need_model,
    prepare_environment,
)
from flows.export_cli import app as export_app
from flows.join_cli import app as join_app
from flows.plan_cli import app as plan_app
from flows.registry_cli import app as registry_app
from flows.service_cli import app as service_app
from flows.serving_cli import app as serving_app
from schemas.config import RunConfig
from schemas.llamafactory.translation import Translation
from schemas.loading import ConfigError
from tasks import garbage
from tasks.lean_imports import leave_torch_out

_WITHOUT_MODELS = ("check", "init")
"""Commands that read rows and tokenizers alone: their process is done before it would have imported torch."""

app = typer.Typer(
    name="sft",
    help="Fine-tune language models in a way that people can trust.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(registry_app)
app.add_typer(plan_app)
app.add_typer(join_app)
app.add_typer(export_app)
app.add_typer(around_app)
app.add_typer(serving_app)
app.add_typer(cleaning_app)
app.add_typer(service_app)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        typer.echo(f"sft-pipeline {version('sft-pipeline')}")
        raise typer.Exit


@app.callback()
def _callback(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models in a way that people can trust."""


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    set_: Settings = None,
    report: Annotated[Path | None, typer.Option(help="Write the run report as JSON here.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on with an interrupted run of this config; never; or a run's id.")
    ] = "auto",
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Reuse results of unchanged stages.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="Also leave the merged model in this folder, new or empty.")
    ] = None,
    full_answers: Annotated[bool, typer.Option("--full-answers", help="Do not shorten answers in the table.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log lines too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings, errors and the verdict alone.")] = False,
) -> None:
    """Run the pipeline: dataset and base model in, registered and evaluated model out.

    A training or an export of LLaMA-Factory's is taken as it is; `sft import` shows what becomes of its keys.
    """
    if verbose and quiet:
        fail(ConfigError("--verbose and --quiet: one asks for more lines, the other for fewer: give one of them"))
    loaded = _load(config, overrides, set_)
    prepare_environment(cache=cache)
    if isinstance(loaded, Translation):
        _export(loaded, config)
        return
    _check_is_free(output)
    check_files(report=report)
    _check_home()
    from flows.temporary_server import ServerStartError, starting_server

    try:
        with console.status("Starting"), starting_server(), garbage.importing():
            from flows import stages  # noqa: F401  takes as long as the server
            from flows.ending import end_with_run, ignore_signals, take_outcome
            from flows.pipeline import sft_pipeline
            from flows.run_pace import note_rest
            from flows.terminal import lived_seconds, quiet_prefect, show_outcome
    except ServerStartError as error:
        fail(error)
    if not verbose:
        quiet_prefect(only_warnings=quiet)

    end_with_run()
    try:
        outcome = sft_pipeline(loaded, resume=resume)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted.[/] The same command goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    except Exception as error:
        if (finished := take_outcome()) is None:
            _fail_run(error, report)
        outcome = finished
        console.print(f"[yellow]The run is finished, but Prefect could not be told:[/] {escape(str(error))}")
    ignore_signals()
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(outcome.model_dump_json(indent=2) + "\n", encoding="utf-8")
    show_outcome(outcome, full_answers=full_answers, only_verdict=quiet)
    note_rest(outcome, lived_seconds())
    if output is not None:
        from flows.exporting import copy_model

        copy_model(outcome.mlflow_run_id, output)
        console.print(escape(f"Merged model in {output}: sft chat {output}"), soft_wrap=True)


def _fail_run(error: Exception, report: Path | None) -> NoReturn:
    """End a run that failed: the report says so, and the terminal why."""
    from flows.terminal import write_failure
    from flows.troubles import explain_trouble

    if report is not None:
        write_failure(report, error)
    if (trouble := explain_trouble(error)) is not None:
        fail(trouble)
    if not isinstance(error, ValueError):
        console.print_exception()
    fail(error)


def _check_is_free(folder: Path | None) -> None:
    if folder is not None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        fail(ConfigError(f"--output {folder}: is there already, and not empty: give a new folder"))


def _check_home() -> None:
    """End with a message where nothing can be written to SFT_HOME, before a minute of imports."""
    from tasks.storage import HomeError, check_home

    try:
        check_home()
    except HomeError as error:
        fail(error)


def _load(path: Path, overrides: list[str] | None, set_: list[str] | None) -> RunConfig | Translation:
    from flows.importing import load_any

    try:
        return load_any(path, overrides or (), set_ or ())
    except ConfigError as error:
        fail(error)


def _export(translation: Translation, path: Path) -> None:
    """Do an export of LLaMA-Factory's."""
    from flows.importing import find_trained

    if translation.kind == "chat":
        fail(ConfigError(f"{path}: it trains nothing (no do_train, no export_dir): sft chat {path} talks to its model"))
    values = translation.values
    try:
        adapter = find_trained(values["adapter"])
    except ConfigError as error:
        fail(error)
    merge(adapter, Path(values["folder"]), values["base_model"], values["max_shard_size"])


@app.command()
def merge(
    adapter: Annotated[
        str,
        typer.Argument(
            help="Folder of an adapter, of trained weights or of a checkpoint; or NAME, NAME/VERSION, NAME@alias, "
            "whose model is copied."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Gets the merged model; new or empty.")],
    base_model: Annotated[str, typer.Option(help="Folder or hub name. Default: what the adapter names.")] = "",
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
) -> None:
    """Merge an adapter into its base model, and prove the result against base + adapter."""
    prepare_environment(cache=True)
    from flows.exporting import export_merged
    from flows.targets import copy_version, is_version

    try:
        if is_version(adapter):
            console.print(escape(f"{copy_version(adapter, folder)} is merged and proven already: copied into {folder}"))
            return
        check = export_merged(base_model, adapter, folder, max_shard_size=max_shard_size)
    except ValueError as error:
        fail(error)
    agreement = f"{check.greedy_agreement:.1%} of the greedy tokens agree"
    console.print(
        f"Merged into {escape(str(folder))}: {agreement}, largest logit difference {check.max_abs_logit_diff:.2g}"
    )


@app.command("import")
def import_(
    config: Annotated[Path, typer.Argument(help="LLaMA-Factory's, TRL's or Axolotl's YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value over its keys.", show_default=False)] = None,
) -> None:
    """Translate a config of LLaMA-Factory, TRL or Axolotl: ours to the output, a table of its keys to the terminal."""
    from flows.importing import check_usable, print_config, show_translation, translate_file
    from schemas.foreign import name_program
    from schemas.loading import read_mapping

    try:
        values = read_mapping(config)
        if not name_program(values):
            raise ConfigError(
                f"{config}: none of LLaMA-Factory's, TRL's or Axolotl's: such a config has model_name_or_path or "
                "base_model at its top"
            )
        translation = translate_file(config, values, overrides or ())
        show_translation(translation)
        check_usable(translation, config)
        print_config(translation, config)
    except ConfigError as error:
        fail(error)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="File, folder or hub name of a dataset.")],
    config: Annotated[Path | None, typer.Option(help="YAML config whose settings and tokenizer are used.")] = None,
    set_: Settings = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write what was found as JSON here.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write what was found as a page for people here.")] = None,
) -> None:
    """Validate a dataset and show what would be trained, without training. Exit code 1 when a budget is broken."""
    loaded = load_for_data(data, config, set_)
    need_model(loaded)
    check_files(json_=json_, html=html)
    prepare_environment(cache=True)
    try:
        with console.status("Counting rows and tokens"):
            from flows.check_tables import show_check
            from flows.checking import check_dataset

            found = check_dataset(loaded.read_data, loaded.model, loaded.tokenization, seed=loaded.seed, page=html)
    except ValueError as error:
        fail(error)
    if json_ is not None:
        json_.parent.mkdir(parents=True, exist_ok=True)
        json_.write_text(found.to_json(), encoding="utf-8")
    if is_demo_model(loaded):
        console.print(
            "[yellow]No model is named:[/] template, tokens and lengths are those of the demo's model, with which "
            f"examples end after {found.max_length:,} tokens, and not of yours: give --config, or --set "
            "model.base_model=NAME",
            soft_wrap=True,
        )
    show_check(found, data)
    if found.problems:
        raise typer.Exit(1)


def main() -> None:
    """Run the console script."""
    if sys.argv[1:2] and sys.argv[1] in _WITHOUT_MODELS:
        leave_torch_out()
    garbage.skip_passes_at_exit()
    app()


if __name__ == "__main__":
    main()
