"""Commands of `sft` around a served model: serve-model, prove."""

import json
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


@app.command()
def prove(
    url: Annotated[str, typer.Argument(help="Of a server of OpenAI's API, such as http://127.0.0.1:8000.")],
    version: Annotated[
        str, typer.Argument(help="NAME (its champion), NAME/VERSION or NAME@alias. Default: the only champion.")
    ] = "",
    model: Annotated[str, typer.Option(help="Served model name. Default: the first that the server lists.")] = "",
    api_key: Annotated[str, typer.Option(envvar="SFT_SERVE_API_KEY", help="Of the server.", show_default=False)] = "",
    precision: Annotated[
        str, typer.Option(help="stored: weights as they are; bf16: rounding to 16 bits is meant.")
    ] = "stored",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether an address serves a version: exit code 0 if so, 1 if not, 3 where it cannot be shown."""
    if precision not in ("stored", "bf16"):
        fail(ValueError(f"--precision {precision}: stored or bf16 is wanted"))
    prepare_environment(cache=True)
    from flows.proving import EXIT_CODES, prove_served

    try:
        with console.status("Asking"):
            found = prove_served(url, version, model=model, api_key=api_key, precision=precision)
    except ValueError as error:
        fail(error)
    proof = found.proof
    if json_:
        typer.echo(json.dumps(found.as_values(), indent=2, ensure_ascii=False))
        raise typer.Exit(EXIT_CODES[proof.outcome])
    told = {"same": "is", "different": "is not", "undecided": "may be"}[proof.outcome]
    colour = {"same": "green", "different": "red", "undecided": "yellow"}[proof.outcome]
    console.print(f"[bold {colour}]{escape(url)} {told} {escape(found.version)}[/]", soft_wrap=True)
    for reason in proof.reasons:
        console.print(f"- {escape(reason)}", soft_wrap=True)
    for note in proof.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    measured = "" if proof.difference is None else f", mean difference {proof.difference:.2g} nats"
    prompts = "prompt ids compared" if proof.knows_prompts else "lengths of prompts compared"
    console.print(
        f"[dim]{proof.num_probes} requests, {proof.num_positions} tokens{measured} (limit {proof.limit:.2g}), "
        f"{prompts}[/]",
        soft_wrap=True,
    )
    raise typer.Exit(EXIT_CODES[proof.outcome])


def _write_vllm(
    model: str, host: str, port: int, length: int | None, names: list[str] | None, check: Path | None
) -> None:
    """Print vLLM's command for a model, or what is wrong with another one."""
    from flows.vllm import check_vllm, write_vllm

    if check is None:
        written = write_vllm(model, host=host, port=port, length=length, name=names[0] if names else "")
        for words in filter(None, (written.copying, written.words)):
            typer.echo(shlex.join(words))
        problems = written.problems
    else:
        problems = check_vllm(model, check, name=names[0] if names else "")
        if not problems:
            console.print("The command serves the model as it was evaluated.")
    for problem in problems:
        console.print(f"[yellow]-[/] {escape(problem)}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)
