"""Commands of `sft` on servers: serve, stop, deploy."""

import os
from typing import Annotated

import typer
from rich.console import Console

from flows.console import console, fail
from schemas.plurals import count_of

app = typer.Typer()


@app.command()
def serve() -> None:
    """Start the Prefect and MLflow servers and a CPU and a GPU worker on this machine, in the background.

    These variables say how: SFT_HOST, SFT_PUBLIC_HOST, SFT_PREFECT_PORT, SFT_MLFLOW_PORT, SFT_DATABASE_URL (of a
    PostgreSQL server), SFT_ARTIFACTS (folder or s3://bucket), SFT_ALLOWED_ORIGINS (pages of a reverse proxy),
    SFT_DATA_ROOTS (what runs from the form may read), SFT_AUTH (off: no log-in, on this machine only).
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    from flows.service import lifecycle, processes, settings

    os.umask(processes.PRIVATE)
    try:
        service = lifecycle.serve(settings.read_settings(), say=console.print)
        out = Console(highlight=False)
        for line in service.describe(show_password=out.is_terminal):
            out.print(line, soft_wrap=True)
    except ValueError as error:
        fail(error)


@app.command()
def stop() -> None:
    """Stop the servers and workers of this machine, and the runs in them."""
    from flows.service import lifecycle, settings

    try:
        number = lifecycle.stop(settings.read_settings())
    except ValueError as error:
        fail(error)
    told = count_of(number, "process", "processes")
    console.print(f"Stopped {told}." if number else "Nothing was running.")


@app.command()
def deploy(
    pool_type: Annotated[str, typer.Option(help="Type of the work pools that are missing.")] = "process",
) -> None:
    """Create work pools, deployments and automations on the Prefect server of PREFECT_API_URL."""
    from flows.service.deployments import deploy_all

    if not os.environ.get("PREFECT_API_URL"):
        fail(ValueError("PREFECT_API_URL is not set: give the address of the Prefect server, ending in /api"))
    try:
        deploy_all(pool_type=pool_type)
    except ValueError as error:
        fail(error)
    console.print("Deployed.")
