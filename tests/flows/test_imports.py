"""What a worker imports to cancel a run, and what every process of a run imports before its body, stays light."""

import subprocess
import sys

from flows.service.deployments import read_deployments

_HEAVY = {"torch", "transformers", "peft", "pandera", "matplotlib", "sklearn", "datasets"}


def test_the_flows_of_deployments_are_imported_without_what_their_stages_work_with() -> None:
    modules = sorted({deployment["entrypoint"].rpartition(".")[0] for deployment in read_deployments()})
    assert "flows.pipeline" in modules
    code = f"import sys, {', '.join(modules)}; print(*sorted({_HEAVY!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_commands_and_what_they_start_do_without_what_is_only_looked_for() -> None:
    code = "import os, subprocess, sys; from flows.console import prepare_environment; prepare_environment(cache=True);"
    code += "import jsonschema; print('lark' in sys.modules, flush=True);"
    code += (
        "subprocess.run([sys.executable, '-c', 'import jsonschema, sys; print(\"lark\" in sys.modules)'], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
