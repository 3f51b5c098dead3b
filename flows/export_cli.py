"""The command `sft export`."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.console import console, escape, fail, prepare_environment
from schemas.loading import ConfigError

if TYPE_CHECKING:
    from flows.export_versions import Exported

app = typer.Typer()


@app.command()
def export(
    version: Annotated[
        str, typer.Argument(help="NAME (its champion), NAME/VERSION or NAME@alias. Default: the only champion.")
    ] = "",
    form: Annotated[
        str,
        typer.Option(
            "--format", help="gguf-q8_0, -q4_0, -f16, -bf16 or -f32 (gguf is gguf-q8_0); int8 or int4 for vLLM."
        ),
    ] = "gguf",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also leave the files in this folder, new or empty.")
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Least part of greedy tokens and ends that are the version's. Default: by form."
        ),
    ] = None,
    push: Annotated[str, typer.Option(help="Also upload to this repository of the hub, OWNER/NAME; private.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: say what would be uploaded.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a version in another form, prove it against the version, and register it as NAME-FORM."""
    if dry_run and not push:
        fail(ConfigError("--dry-run goes with --push"))
    if output is not None and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        fail(ConfigError(f"--output {output}: is there already, and not empty: give a new folder"))
    prepare_environment(cache=True)
    from flows.export_versions import export_version
    from flows.hub import describe_upload, upload

    try:
        with console.status("Loading") as status:
            made = export_version(
                version, "gguf-q8_0" if form == "gguf" else form, least_agreement=min_agreement, on_phase=status.update
            )
        if json_:
            typer.echo(json.dumps(made.as_values(), indent=2, ensure_ascii=False))
        else:
            show_exported(made, tells_folder=output is None)
        if output is not None:
            shutil.copytree(made.folder, output, dirs_exist_ok=True)
            console.print(f"Its files are in {escape(str(output))}", soft_wrap=True)
        if push:
            told = describe_upload(made.folder, push) if dry_run else upload(made.folder, push, made.version)
            console.print(escape(told), soft_wrap=True)
    except ValueError as error:
        fail(error)


def show_exported(made: "Exported", *, tells_folder: bool = True) -> None:
    """Print what was made, how near it is, and where this machine keeps it."""
    from flows.export_versions import tell_proof
    from flows.terminal import make_metrics_table

    out = Console(highlight=False)
    known = "" if made.is_new else " (registered before)"
    size = f"{made.num_bytes / 2**20:,.1f} MiB, the version has {made.parent_bytes / 2**20:,.1f} MiB"
    out.print(f"[bold]{escape(made.version)}[/]{known}: {made.form} of {escape(made.parent)}, {size}", soft_wrap=True)
    out.print(f"{tell_proof(made.proof)}.", soft_wrap=True)
    title = f"{made.form} on {made.num_examples:,} rows, beside {made.parent}"
    out.print(make_metrics_table(title, "version", made.before, made.delta, other="export"))
    for note in made.notes:
        out.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    if tells_folder:
        out.print(f"Its files are in {escape(str(made.folder))}", soft_wrap=True)
