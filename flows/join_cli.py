"""The command `sft join`."""

import os
import signal
from types import FrameType
from typing import Annotated

import typer

from flows.console import console, escape, fail, prepare_environment
from schemas.loading import ConfigError
from schemas.plurals import count_of

app = typer.Typer()
_SIGTERM_CODE = 128 + signal.SIGTERM


class _EndedError(BaseException):
    """A scheduler takes this machine away."""


@app.command()
def join(
    team: Annotated[
        str,
        typer.Argument(envvar="SFT_TEAM", help="Folder or address that the machines share, as s3://bucket/team."),
    ],
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait for a training, also after one was lost.")] = 3600,
    torchrun: Annotated[
        bool, typer.Option("--torchrun", help="Fetch what is needed, print torchrun's command, and do not train.")
    ] = False,
) -> None:
    """Train with the machine of a run that has training.num_nodes above 1, until the training is over.

    The others may come and go: a lost machine's rows are taken by those that are left, from the last checkpoint on.
    SIGTERM (a machine that is taken away) ends it after a checkpoint, with exit code 143.
    """
    prepare_environment(cache=True)
    from tasks.storage import make_home
    from tasks.training.place import TEAM_VARIABLE, open_place
    from tasks.training.process.joining import join_team, prepare_command
    from tasks.training.records import TrainingCrash

    signal.signal(signal.SIGTERM, _end)
    os.environ[TEAM_VARIABLE] = team
    try:
        place, folder = open_place(team), make_home() / "team"
        if torchrun:
            typer.echo(prepare_command(place, folder, wait_seconds=wait))
            return
        num_trainings = join_team(place, folder, wait_seconds=wait, on_log=_show)
    except (ValueError, ConfigError, TrainingCrash) as error:
        fail(error)
    except KeyboardInterrupt:
        console.print("[yellow]Left.[/] The others go on.")
        raise typer.Exit(130) from None
    except _EndedError:
        console.print("[yellow]This machine is taken away.[/] The others go on from the checkpoint.")
        raise typer.Exit(_SIGTERM_CODE) from None
    console.print(f"Took part in {count_of(num_trainings, 'training')}, of which none is left.")


def _end(number: int, frame: FrameType | None) -> None:
    raise _EndedError


def _show(level: int, text: str) -> None:
    console.print(escape(text), soft_wrap=True)
