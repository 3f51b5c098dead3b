"""Commands of `sft` around a served model: serve-model."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from flows.console import console, escape, fail, prepare_environment

app = typer.Typer()
_TARGET = (
    "NAME (its champion), NAME/VERSION, NAME@alias, or the folder of a model, an adapter, trained weights or a "
    "checkpoint. Default: the only champion."
)


@app.command("serve-model")
def serve_model(
    model: Annotated[str, typer.Argument(help=_TARGET)] = "",
    host: Annotated[str, typer.Option(help="Address; beyond loopback a key is wanted.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8000,
    api_key: Annotated[
        str, typer.Option(envvar="SFT_SERVE_API_KEY", help="Asked of every request but /health.", show_default=False)
    ] = "",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name that requests may come by, beside the address. Repeatable.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Served model name. Repeatable. Default: the registered name.")
    ] = None,
    base_model: Annotated[str, typer.Option(help="Folder or hub name, where an adapter names none.")] = "",
    precision: Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on a CPU), bf16 or fp32.")] = "auto",
    batch: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Most requests answered at once. Default: 64, on a CPU 16.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a conversation. Default: the model's context, if it fits.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=5.0, help="Where a request names none. 0: greedy, as in the evaluation.")
    ] = 0.0,
    engine: Annotated[str, typer.Option(help="transformers, or vllm: write vLLM's command and check it.")] = (
        "transformers"
    ),
    check: Annotated[
        Path | None, typer.Option(help="File with a vLLM command of your own; exit code 1 when it would differ.")
    ] = None,
) -> None:
    """Serve a version behind OpenAI's chat API."""
    if engine not in ("transformers", "vllm"):
        fail(ValueError(f"--engine {engine}: transformers or vllm is wanted"))
    if precision not in ("auto", "bf16", "fp32"):
        fail(ValueError(f"--precision {precision}: auto, bf16 or fp32 is wanted"))
    if check is not None and engine != "vllm":
        fail(ValueError("--check is for a command of vLLM's: add --engine vllm"))
    prepare_environment(cache=True)
    from flows.serving import ServingOptions, check_options, opening_served, serve

    options = ServingOptions(
        host=host,
        port=port,
        api_key=api_key,
        allowed_hosts=tuple(allow_host or ()),
        names=tuple(name or ()),
        precision=precision,
        num_rows=batch,
        length=max_length,
        temperature=temperature,
    )
    try:
        if engine == "vllm":
            _write_vllm(model, options.host, port, max_length, name, check)
            return
        check_options(options)
        status = console.status("Loading")
        status.start()
        with opening_served(model, options, base_model=base_model) as served:
            status.stop()
            for note in served.notes:
                console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
            place = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
            told = f"[bold]{escape(served.names[0])}[/] at {escape(place)}/v1, up to {served.length:,} tokens"
            serve(served, options, on_start=lambda: console.print(f"{told}. Ctrl-C ends it.", soft_wrap=True))
    except ValueError as error:
        fail(error)


def _write_vllm(
    model: str, host: str, port: int, length: int | None, names: list[str] | None, check: Path | None
) -> None:
    """Print vLLM's command for a model, or what is wrong with another one."""
    from flows.vllm import check_vllm, write_vllm

    if check is None:
        written = write_vllm(model, host=host, port=port, length=length, name=names[0] if names else "")
        typer.echo(shlex.join(written.words))
        problems = written.problems
    else:
        problems = check_vllm(model, check, name=names[0] if names else "")
        if not problems:
            console.print("The command serves the model as it was evaluated.")
    for problem in problems:
        console.print(f"[yellow]-[/] {escape(problem)}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)
