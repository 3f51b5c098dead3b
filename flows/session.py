"""Python sessions: what the command `sft` makes ready before a run, for a notebook or a script."""

import sys
import warnings

from flows.console import prepare_environment


def prepare_session() -> None:
    """Set what Prefect, MLflow and the model libraries read at import, and keep the engine's own lines off the screen.

    A notebook or an interactive session needs no call: importing anything of `flows` makes it. A script calls it
    before it imports `flows.pipeline`.
    """
    prepare_environment(cache=True)
    # tqdm says so at import in a notebook; no bar of ours needs it.
    warnings.filterwarnings("ignore", message="IProgress not found")
    from flows.terminal import quiet_prefect  # imports Prefect, which reads the environment

    quiet_prefect()


def is_interactive() -> bool:
    """Tell whether a person types here: in a notebook's kernel, or at Python's prompt."""
    return "ipykernel" in sys.modules or hasattr(sys, "ps1")
